"""Checks of recurrent networks' arguments. Each passes silently or raises one typed error naming the argument."""

from __future__ import annotations

from torch import Tensor

from linattn.errors import ArgumentError, ShapeError, refusal
from linattn.recurrence import check_like


def check_size(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(ArgumentError, f"{name} is no count", given=repr(value), accepted="an int of at least 1")


def check_sequence(x: object, input_size: int, weight: Tensor) -> Tensor:
    """Return `x` if it is a `[B, T >= 1, input_size]` tensor of the weights' dtype and device."""
    if not isinstance(x, Tensor):
        raise refusal(
            ArgumentError,
            "x is no sequence",
            given=type(x).__name__,
            accepted=f"a torch.Tensor [B, T, {input_size}] or a PackedSequence",
        )
    if x.dim() != 3 or x.shape[2] != input_size:
        raise refusal(ShapeError, "x has the wrong shape", given=list(x.shape), accepted=f"[B, T, {input_size}]")
    if x.shape[1] == 0:
        raise refusal(ShapeError, "x has no time step", given=list(x.shape), accepted="at least one time step")
    check_like("x", x, weight)
    return x
