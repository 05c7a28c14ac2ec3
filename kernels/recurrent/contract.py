"""What every backend of the recurrent ops agrees on: the cells, and the tensors that a call makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# h_t = act(z_t), or an LSTM; z_t = projected_t + W_h h_{t-1}. The order is that of `Cell` in native/recurrent.hpp.
CELLS = ("tanh", "relu", "identity", "lstm")


def gates(cell: str) -> int:
    """G: `projected` has G H columns and `weight_h` G H rows."""
    return 4 if cell == "lstm" else 1


class Inputs(NamedTuple):
    """Of the forward pass, as `FORWARD` in ops.py has them."""

    projected: Tensor
    weight_h: Tensor
    h0: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    cell: str


class Arriving(NamedTuple):
    """Gradients to what the forward pass returned; None for what nobody read."""

    all_h: Tensor | None
    last_h: Tensor | None
    last_c: Tensor | None


class Walked(NamedTuple):
    """What the backward pass knows of the forward one."""

    weight_h: Tensor
    h0: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    all_h: Tensor
    cells: Tensor
    activations: Tensor
    cell: str


def outputs(given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the forward pass returns, uninitialised; see `FORWARD` in ops.py."""
    projected, h0 = given.projected, given.h0
    B, T, _ = projected.shape
    H, lstm = h0.shape[1], given.cell == "lstm"
    return (
        projected.new_empty(B, T, H),
        h0.new_empty(B, H),
        h0.new_empty((B, H) if lstm else (0,)),
        projected.new_empty((B, T, H) if lstm and save else (0,)),
        projected.new_empty((B, T, 4 * H) if lstm and save else (0,)),
    )


def gradients(walked: Walked) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass returns, uninitialised."""
    h0 = walked.h0
    B, T, _ = walked.all_h.shape
    dprojected = walked.all_h.new_empty(B, T, walked.weight_h.shape[0])
    return dprojected, h0.new_empty(h0.shape), h0.new_empty(h0.shape if walked.cell == "lstm" else (0,))
