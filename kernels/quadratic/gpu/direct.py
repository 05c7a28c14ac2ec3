"""The direct form of the quadratic ops: options in, tiles out (kernels/common/gpu/direct)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.gpu import direct
from linattn.kernels.common.gpu.similarity import quadratic

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.contract import Options


def _problem(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> direct.DirectProblem:
    is_causal, q_offset, scale, c0, c1, c2, normalize = options
    similarity = quadratic(scale, (c0, c1, c2), normalize)
    return direct.DirectProblem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, similarity, normalize)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Out and the row sums, without a state."""
    return direct.forward(_problem(q, k, v, key_mask, cu_seqlens, options))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    l: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    options: Options,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; those not wanted hold anything."""
    problem = _problem(q, k, v, key_mask, cu_seqlens, options)
    return direct.backward(problem, dout, out, l, (wanted[0], wanted[1], wanted[2]))


def describe(q: Tensor, v: Tensor) -> str:
    """The kernels that a call runs, and their configuration."""
    return direct.describe(q, v, "quadratic")
