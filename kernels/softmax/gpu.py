"""The Triton backend of the softmax ops: tiles of the direct form (kernels/common/gpu/direct), weights 2^(a q.k)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.gpu import direct
from linattn.kernels.common.gpu.similarity import softmax

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.softmax.contract import BackwardInputs, ForwardInputs


def _problem(inputs: ForwardInputs | BackwardInputs) -> direct.DirectProblem:
    tensors = (inputs.q, inputs.k, inputs.v, inputs.key_mask, inputs.cu_seqlens)
    return direct.DirectProblem(*tensors, inputs.is_causal, inputs.q_offset, softmax(inputs.scale), normalize=True)


def forward(inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
    """Compute out and the log-sum-exps."""
    return direct.forward(_problem(inputs))


def backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv."""
    return direct.backward(_problem(inputs), inputs.dout, inputs.out, inputs.lse, (True, True, True))


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """Return the kernels that a call runs, and their configuration."""
    return direct.describe(q, v, "softmax")
