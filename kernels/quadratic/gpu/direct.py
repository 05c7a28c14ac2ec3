"""The direct form of the quadratic ops: options in, tiles out (kernels/common/gpu/direct)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.gpu import direct
from linattn.kernels.common.gpu.similarity import quadratic

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs


def _problem(inputs: ForwardInputs | BackwardInputs) -> direct.DirectProblem:
    is_causal, q_offset, scale, c0, c1, c2, normalize = inputs.options
    similarity = quadratic(scale, (c0, c1, c2), normalize)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.key_mask, inputs.cu_seqlens)
    return direct.DirectProblem(*tensors, is_causal, q_offset, similarity, normalize)


def forward(inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
    """Compute out and the row sums, without a state."""
    return direct.forward(_problem(inputs))


def backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv; those that are not needed hold anything."""
    needs_dq, needs_dk, needs_dv, _ = inputs.needs_grad
    return direct.backward(_problem(inputs), inputs.dout, inputs.out, inputs.l, (needs_dq, needs_dk, needs_dv))


def describe(q: Tensor, v: Tensor) -> str:
    """Name the kernels that a call runs, and their configuration."""
    return direct.describe(q, v, "quadratic")
