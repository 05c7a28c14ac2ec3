"""What recurrent networks accept. Each check passes silently or raises one typed error naming what was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linattn.errors import ArgumentError, DeviceError, DtypeError, ShapeError, StateError


def check_size(name: str, value: object) -> None:
    """Raise ArgumentError unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(f"{name} must be an int of at least 1, got {value!r}")


def check_sequence(x: object, input_size: int, weight: Tensor) -> Tensor:
    """Return `x` if it is a `[B, T >= 1, input_size]` tensor of the weights' dtype and device."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"x must be a torch.Tensor of shape [B, T, {input_size}], got {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != input_size:
        raise ShapeError(f"x must have shape [B, T, {input_size}], got {list(x.shape)}")
    if x.shape[1] == 0:
        raise ShapeError(f"x must have at least one time step, got shape {list(x.shape)}")
    _check_like("x", x, weight)
    return x


def check_state(name: str, state: object, shape: Sequence[int], x: Tensor) -> Tensor:
    """Return `state` if it is a tensor of exactly this shape, with the dtype and device of the inputs `x`."""
    if not isinstance(state, Tensor):
        raise StateError(f"{name} must be a torch.Tensor of shape {list(shape)}, got {type(state).__name__}")
    if list(state.shape) != list(shape):
        raise StateError(f"{name} must have shape {list(shape)} for these inputs, got {list(state.shape)}")
    _check_like(name, state, x)
    return state


def _check_like(name: str, given: Tensor, like: Tensor) -> None:
    if given.device != like.device:
        raise DeviceError(f"{name} is on {given.device}, but this call runs on {like.device}")
    # Autocast casts both sides of every product itself.
    if given.dtype != like.dtype and not torch.is_autocast_enabled(given.device.type):
        raise DtypeError(f"{name} has dtype {given.dtype}, expected {like.dtype}; only autocast accepts mixed dtypes")
