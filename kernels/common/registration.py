"""How an op gets its schema, its fake and its backends. Every op of the library is registered here, once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("linattn", "DEF")


def define(schema: str, fake: Callable[..., Any], modules: dict[str, str], function: str) -> None:
    """Register `linattn::<schema>`, whose last argument `backend` picks the module that computes it.

    `modules` maps a backend's name to the module whose `function` has the schema's other arguments; it is imported
    when first called. One implementation serves all devices, so a kernel for a new device is a new row in `modules`.
    `define` + `impl` is used instead of `custom_op`, which costs three times as much a call and fails under
    `torch.func.grad`.
    """
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        *inputs, backend = args
        implementation = getattr(importlib.import_module(modules[backend]), function)
        device = next(x for x in inputs if isinstance(x, torch.Tensor)).device.type
        with torch.no_grad():  # derivatives are the business of autograd.py, also inside a backward pass
            if torch.is_autocast_enabled(device):  # inputs were cast already; sums inside stay in full precision
                with torch.autocast(device, enabled=False):
                    return implementation(*inputs)
            return implementation(*inputs)

    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"linattn::{name}", fake, lib=_library)
