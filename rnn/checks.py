"""Checks of recurrent networks' arguments. Each passes silently or raises one typed error naming the argument."""

from __future__ import annotations

from torch import Tensor

from linattn.errors import ArgumentError, ShapeError
from linattn.recurrence import check_like


def check_size(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name} must be an int of at least 1, got {value!r}")


def check_sequence(x: object, input_size: int, weight: Tensor) -> Tensor:
    """Return `x` if it is a `[B, T >= 1, input_size]` tensor of the weights' dtype and device."""
    if not isinstance(x, Tensor):
        raise ArgumentError(
            f"x must be a torch.Tensor of shape [B, T, {input_size}] or a PackedSequence, got {type(x).__name__}"
        )
    if x.dim() != 3 or x.shape[2] != input_size:
        raise ShapeError(f"x must have shape [B, T, {input_size}], got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ShapeError(f"x must have at least one time step, got shape {list(x.shape)}")
    check_like("x", x, weight)
    return x
