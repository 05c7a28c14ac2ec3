"""The differentiable recurrence that the public function calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn.kernels.common.op.double_backward import first_derivative_only, needs_autograd
from linattn.kernels.recurrent import ops as ops  # registers the schemas

if TYPE_CHECKING:
    from linattn.kernels.recurrent.reference import State


def recur(
    projected: Tensor, weight_h: Tensor, initial: State, lengths: Tensor | None, cell: str, backend: str
) -> tuple[Tensor, State]:
    """As `reference.recur`, by the op."""
    h0, c0 = initial if len(initial) == 2 else (*initial, None)
    inputs = (projected, weight_h, h0, c0, lengths)
    if needs_autograd(projected, weight_h, *initial):
        all_h, last_h, last_c, *_ = Recurrence.apply(*inputs, cell, backend)
    else:
        all_h, last_h, last_c, *_ = torch.ops.linattn.recurrent_fwd(*inputs, cell, False, backend)
    return all_h, (last_h,) if c0 is None else (last_h, last_c)


class Recurrence(torch.autograd.Function):
    """Saves the weights, the states and, of an LSTM, its gates; the projected inputs are not needed again."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Run `linattn::recurrent_fwd`, saving what the backward pass needs."""
        projected, weight_h, h0, c0, lengths, cell, backend = inputs
        return torch.ops.linattn.recurrent_fwd(projected, weight_h, h0, c0, lengths, cell, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save the weights, the states and the gates."""
        _, weight_h, h0, c0, lengths, ctx.cell, ctx.backend = inputs
        all_h, _, last_c, cells, activations = output
        ctx.mark_non_differentiable(cells, activations, *([last_c] if c0 is None else []))
        ctx.save_for_backward(weight_h, h0, c0, lengths, all_h, cells, activations)
        ctx.set_materialize_grads(False)  # a classifier reads the last state alone

    @staticmethod
    def backward(ctx: Any, dall_h: Any, dlast_h: Any, dlast_c: Any, *_: Any) -> Any:
        """Return the gradients of the inputs of `forward`."""
        weight_h, h0, c0, lengths, all_h, cells, activations = ctx.saved_tensors
        dlast_c = None if c0 is None else dlast_c
        grad_outputs = (dall_h, dlast_h, dlast_c)
        if all(x is None for x in grad_outputs):
            return (None,) * 7
        dprojected, dh0, dc0 = torch.ops.linattn.recurrent_bwd(
            *grad_outputs, weight_h, h0, c0, lengths, all_h, cells, activations, ctx.cell, ctx.backend
        )
        dweight_h = None
        if ctx.needs_input_grad[1]:
            before = torch.cat((h0[:, None], all_h[:, :-1]), 1)
            dweight_h = dprojected.flatten(0, 1).t() @ before.flatten(0, 1)
        found = (dprojected, dweight_h, dh0, None if c0 is None else dc0)
        of = tuple(x for x in (*grad_outputs, weight_h, h0, c0) if x is not None)
        return *_first_only(found, of), None, None, None


def _first_only(found: Any, of: Any) -> Any:
    """Gradients that cannot be differentiated again without an error; None stays None."""
    wanted = [x for x in found if x is not None]
    instead = "The recurrence with backend='reference' has all of them"
    kept = iter(first_derivative_only("the fused recurrence", tuple(wanted), of, instead))
    return tuple(None if x is None else next(kept) for x in found)
