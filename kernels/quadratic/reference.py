"""Quadratic-kernel attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 2 in q.k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.reference import attention
from linattn.kernels.common.reference.problem import Problem

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute the op's results."""
    return attention.forward(_problem(inputs), inputs)


def backward(inputs: BackwardInputs) -> Gradients:
    """Compute the op's gradients."""
    return attention.backward(_problem(inputs), inputs)


def _problem(inputs: ForwardInputs | BackwardInputs) -> Problem:
    is_causal, q_offset, scale, c0, c1, c2, normalize = inputs.options
    tensors = (inputs.q, inputs.k, inputs.v, inputs.key_mask)
    return Problem(*tensors, is_causal, q_offset, scale, coefficients=(c0, c1, c2), normalize=normalize, degree=2)
