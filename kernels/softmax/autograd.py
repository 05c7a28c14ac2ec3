"""The differentiable softmax attention that the public functions call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linattn.kernels.common.op.double_backward import distinct, first_derivative_only, needs_autograd
from linattn.kernels.softmax import ops as ops  # registers the schemas


def softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
    backend: str,
) -> Tensor:
    """Return out, through autograd only if a gradient may be asked for."""
    if backend == "torch":
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    options = (key_mask, cu_seqlens, is_causal, q_offset, scale, backend)
    if needs_autograd(q, k, v):
        return Softmax.apply(*distinct(q, k, v), *options)[0]
    return torch.ops.linattn.softmax_fwd(q, k, v, *options)[0]  # kernels/softmax/ops.py


class Softmax(torch.autograd.Function):
    """Saves the inputs, out and the log-sum-exps; scores are recomputed."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return out and the log-sum-exps."""
        return torch.ops.linattn.softmax_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save what the backward pass needs."""
        *tensors, ctx.is_causal, ctx.q_offset, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        """Return the gradients of the inputs of `forward`."""
        q, k, v, key_mask, cu_seqlens, out, lse = ctx.saved_tensors
        options = (key_mask, cu_seqlens, ctx.is_causal, ctx.q_offset, ctx.scale, ctx.backend)
        gradients = torch.ops.linattn.softmax_bwd(dout, q, k, v, out, lse, *options)
        return *first_derivative_only("softmax", gradients, (dout, q, k, v)), *[None] * 6
