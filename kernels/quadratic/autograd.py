"""The differentiable quadratic-kernel attention that the public functions call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn.kernels.common.op.double_backward import distinct, needs_autograd
from linattn.kernels.common.op.stateful import Plan, backward_arguments, input_gradients, save_for_backward
from linattn.kernels.quadratic import ops as ops  # registers the schemas
from linattn.kernels.quadratic.contract import STATE_TENSORS, state_shapes

if TYPE_CHECKING:
    from linattn.kernels.quadratic.contract import Options


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: tuple[Tensor, ...],
    options: Options,
    return_state: bool,
    plan: Plan,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return out and the state, through autograd only if a gradient may be asked for."""
    how = (plan.form, plan.chunk_size, plan.backend)
    if needs_autograd(q, k, v, *initial_state):
        inputs = (*distinct(q, k, v), key_mask, cu_seqlens, *initial_state)
        out, _, *rest = Quadratic.apply(tuple(options), return_state, how, *inputs)
        return out, tuple(rest[: STATE_TENSORS if return_state else 0])
    out, _, state, _ = torch.ops.linattn.quadratic_fwd(  # kernels/quadratic/ops.py
        q, k, v, key_mask, cu_seqlens, list(initial_state), *options, return_state, False, *how
    )
    return out, tuple(state)


class Quadratic(torch.autograd.Function):
    """The op with its gradients (what is saved: `save_for_backward`)."""

    @staticmethod
    def forward(  # noqa: PLR0917
        options: Any,
        return_state: Any,
        how: Any,
        q: Any,
        k: Any,
        v: Any,
        key_mask: Any,
        cu_seqlens: Any,
        *initial_state: Any,
    ) -> Any:
        """Return out, the row sums, the state and what is saved, one after another."""
        out, l, state, saved = torch.ops.linattn.quadratic_fwd(
            q, k, v, key_mask, cu_seqlens, list(initial_state), *options, return_state, True, *how
        )
        return (out, l, *state, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save what the backward pass needs."""
        save_for_backward(ctx, inputs, output, STATE_TENSORS)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradients of the inputs of `forward`."""
        arguments = backward_arguments(ctx, gradients, state_shapes)
        return input_gradients("quadratic", arguments, torch.ops.linattn.quadratic_bwd(*arguments))


def row_sums(q: Tensor, k: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options) -> Tensor:
    """Return the normaliser alone, `[B, H, T]`, from scores."""
    plan = Plan("direct", "reference")
    how = (plan.form, plan.chunk_size, plan.backend)
    _, l, _, _ = torch.ops.linattn.quadratic_fwd(
        q, k, k[..., :1], key_mask, cu_seqlens, [], *options, False, False, *how
    )
    return l
