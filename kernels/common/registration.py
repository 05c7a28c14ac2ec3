"""How an op gets its schema, its fake and its backends. Every op of the library is registered here, once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("linattn", "DEF")


def define(schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Register `linattn::<schema>` for every device.

    `run` picks the backend's module (`implementation`) by the schema's last argument, so a kernel for a new device is a
    new row in an op's BACKENDS. `define` + `impl` is used instead of `custom_op`, which costs three times as much a
    call and fails under `torch.func.grad`.
    """
    name = schema.split("(")[0]

    def guarded(*arguments: Any) -> Any:
        device = next(x for x in arguments if isinstance(x, torch.Tensor)).device.type
        with torch.no_grad():  # derivatives are the business of autograd.py, also inside a backward pass
            if torch.is_autocast_enabled(device):  # inputs were cast already; sums inside stay in full precision
                with torch.autocast(device, enabled=False):
                    return run(*arguments)
            return run(*arguments)

    _library.define(schema)
    _library.impl(name, guarded, "CompositeExplicitAutograd")
    torch.library.register_fake(f"linattn::{name}", fake, lib=_library)


def implementation(backends: dict[str, str], backend: str) -> Any:
    """The module behind a backend's name, imported when first called."""
    return importlib.import_module(backends[backend])
