"""Define what every backend of the recurrent ops agrees on: the cells, and the tensors that a call makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# h_t = act(z_t), or an LSTM; z_t = projected_t + W_h h_{t-1}. The order is that of `Cell` in native/recurrent.hpp.
CELLS = ("tanh", "relu", "identity", "lstm")


def gates(cell: str) -> int:
    """G: `projected` has G H columns and `weight_h` G H rows."""
    return 4 if cell == "lstm" else 1


class ForwardInputs(NamedTuple):
    """Hold what every backend's `forward` takes, as `FORWARD` in ops.py has it."""

    projected: Tensor
    weight_h: Tensor
    h0: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    cell: str


class GradOutputs(NamedTuple):
    """Gradients of what the forward pass returned; None for what was not used."""

    all_h: Tensor | None
    last_h: Tensor | None
    last_c: Tensor | None


class Saved(NamedTuple):
    """Inputs and results of the forward pass that the backward pass reads."""

    weight_h: Tensor
    h0: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    all_h: Tensor
    cells: Tensor
    activations: Tensor
    cell: str


class Implementation(Protocol):
    """A backend: a module of these functions."""

    def forward(self, inputs: ForwardInputs, save: bool, /) -> tuple[Tensor, ...]:
        """Take all steps; `save` what the backward pass of an LSTM reads."""

    def backward(self, grad_outputs: GradOutputs, saved: Saved, /) -> tuple[Tensor, ...]:
        """Take all steps back."""


def outputs(inputs: ForwardInputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what the forward pass returns; see `FORWARD` in ops.py."""
    projected, h0 = inputs.projected, inputs.h0
    B, T, _ = projected.shape
    H, lstm = h0.shape[1], inputs.cell == "lstm"
    return (
        projected.new_empty(B, T, H),
        h0.new_empty(B, H),
        h0.new_empty((B, H) if lstm else (0,)),
        projected.new_empty((B, T, H) if lstm and save else (0,)),
        projected.new_empty((B, T, 4 * H) if lstm and save else (0,)),
    )


def gradients(saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what the backward pass returns."""
    h0 = saved.h0
    B, T, _ = saved.all_h.shape
    dprojected = saved.all_h.new_empty(B, T, saved.weight_h.shape[0])
    return dprojected, h0.new_empty(h0.shape), h0.new_empty(h0.shape if saved.cell == "lstm" else (0,))
