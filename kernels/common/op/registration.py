"""How an op gets its schema, its fake and its backends. Every op of the library is registered here, once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_library = torch.library.Library("linattn", "DEF")


def define(schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Register `linattn::<schema>` for every device.

    `run` picks the backend by the schema's last argument. `define` + `impl` is used instead of `custom_op`, which costs
    three times as much a call and fails under `torch.func.grad`.
    """
    name = schema.split("(")[0]

    def guarded(*arguments: Any) -> Any:
        device = next(x for x in arguments if isinstance(x, torch.Tensor)).device.type
        # Derivatives belong to kernels/<op>/autograd.py, also in a backward pass. Inputs are autocast already.
        with torch.no_grad(), full_precision(device):
            return run(*arguments)

    _library.define(schema)
    _library.impl(name, guarded, "CompositeExplicitAutograd")
    torch.library.register_fake(f"linattn::{name}", fake, lib=_library)


def full_precision(device: str) -> AbstractContextManager[Any]:
    """No autocast inside: sums stay in the accumulation dtype."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
