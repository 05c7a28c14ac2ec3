"""The Triton backend of the softmax ops: tiles of the direct form (kernels/common/gpu/direct), weights 2^(a q.k)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.gpu import direct
from linattn.kernels.common.gpu.similarity import softmax

if TYPE_CHECKING:
    from torch import Tensor


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
) -> direct.DirectProblem:
    return direct.DirectProblem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, softmax(scale), normalize=True)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The contract of `torch.ops.linattn.softmax_fwd` (ops.py)."""
    return direct.forward(_problem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, scale))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `torch.ops.linattn.softmax_bwd` (ops.py)."""
    problem = _problem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, scale)
    return direct.backward(problem, dout, out, lse, (True, True, True))


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """The kernels that a call runs, and their configuration."""
    return direct.describe(q, v, "softmax")
