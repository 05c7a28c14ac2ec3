"""The autograd.Function of the ops that carry a state: what is saved, what is recomputed, what has no derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linattn.errors import DoubleBackwardError

STATE_TENSORS = {"quadratic": 6, "feature_map": 3}


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: tuple[Tensor, ...],
    options: tuple[Any, ...],
    return_state: bool,
    form: str,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Call `linattn::<op>_fwd`, through autograd only if a gradient may be asked for. Returns out and the state."""
    inputs = (q, k, v, key_mask, cu_seqlens)
    how = (form, chunk_size, backend)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *initial_state)):
        out, _, *rest = StatefulAttention.apply(op, options, return_state, how, *inputs, *initial_state)
        return out, tuple(rest[: STATE_TENSORS[op] if return_state else 0])
    forward = getattr(torch.ops.linattn, op + "_fwd")
    out, _, state, _ = forward(*inputs, list(initial_state), *options, return_state, *how)
    return out, tuple(state)


class StatefulAttention(torch.autograd.Function):
    """Saves the inputs, out, the row sums and what the backend adds; scores, features and states are recomputed."""

    @staticmethod
    def forward(op, options, return_state, how, q, k, v, key_mask, cu_seqlens, *initial_state):
        forward = getattr(torch.ops.linattn, op + "_fwd")
        out, l, state, saved = forward(q, k, v, key_mask, cu_seqlens, list(initial_state), *options, return_state, *how)
        return (out, l, *state, *saved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.options, return_state, ctx.how, *tensors = inputs
        out, l, *rest = output
        ctx.states = STATE_TENSORS[ctx.op] if return_state else 0
        saved = rest[ctx.states :]
        ctx.mark_non_differentiable(l, *rest[: min(ctx.states, 1)], *saved)
        ctx.save_for_backward(out, l, *tensors, *saved)
        ctx.count = len(tensors)

    @staticmethod
    def backward(ctx, dout, dl, *drest):
        out, l, *tensors = ctx.saved_tensors
        (q, k, v, key_mask, cu_seqlens, *initial_state), saved = tensors[: ctx.count], tensors[ctx.count :]
        dstate = list(drest[1 : ctx.states])
        backward = getattr(torch.ops.linattn, ctx.op + "_bwd")
        dq, dk, dv, dinitial = backward(
            dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state, *ctx.options, *ctx.how
        )
        gradients = (dq, dk, dv, *dinitial)
        dq, dk, dv, *dinitial = first_derivative_only(ctx.op, gradients, (dout, *dstate, q, k, v))
        dn = [None] if dinitial else []
        return None, None, None, None, dq, dk, dv, None, None, *dn, *dinitial


def first_derivative_only(op: str, gradients: tuple[Tensor, ...], of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Make a second backward pass through `gradients` raise, instead of silently returning nothing."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return FirstDerivativeOnly.apply(op, len(gradients), *gradients, *of)
    return gradients


class FirstDerivativeOnly(torch.autograd.Function):
    @staticmethod
    def forward(op, count, *tensors):
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        raise DoubleBackwardError(
            f"{ctx.op} attention has a first derivative only; given: a backward pass through its gradients. "
            "linattn.kernel_attention, with sim=lambda q, k: (1 + q @ k.mT) ** 2 for example, has all of them."
        )
