"""What every backend of the recurrent ops agrees on: the cells, and the tensors that a call makes."""

from __future__ import annotations

from torch import Tensor

# h_t = act(z_t), or an LSTM; z_t = projected_t + W_h h_{t-1}. The order is that of `Cell` in cpu.hpp.
CELLS = ("tanh", "relu", "identity", "lstm")


def gates(cell: str) -> int:
    """G: `projected` has G H columns and `weight_h` G H rows."""
    return 4 if cell == "lstm" else 1


def outputs(projected: Tensor, h0: Tensor, cell: str, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the forward pass returns, uninitialised; see `FORWARD` in ops.py."""
    B, T, _ = projected.shape
    H, lstm = h0.shape[1], cell == "lstm"
    return (
        projected.new_empty(B, T, H),
        h0.new_empty(B, H),
        h0.new_empty((B, H) if lstm else (0,)),
        projected.new_empty((B, T, H) if lstm and save else (0,)),
        projected.new_empty((B, T, 4 * H) if lstm and save else (0,)),
    )


def gradients(weight_h: Tensor, h0: Tensor, all_h: Tensor, cell: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward pass returns, uninitialised."""
    B, T, _ = all_h.shape
    dprojected = all_h.new_empty(B, T, weight_h.shape[0])
    return dprojected, h0.new_empty(h0.shape), h0.new_empty(h0.shape if cell == "lstm" else (0,))
