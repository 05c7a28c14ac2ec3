"""Quadratic-kernel attention in plain PyTorch: any device, fp64 too."""

from __future__ import annotations

from torch import Tensor

from ..common.allocation import empty_in_storage_order
from ..common.polynomial import attention
from ..common.polynomial.problem import Problem


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
    c0: float,
    c1: float,
    c2: float,
    normalize: bool,
) -> Problem:
    return Problem(
        q, k, v, key_mask, is_causal, q_offset, scale, coefficients=(c0, c1, c2), normalize=normalize, degree=2
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: list[Tensor],
    is_causal: bool,
    q_offset: int,
    scale: float,
    c0: float,
    c1: float,
    c2: float,
    normalize: bool,
    return_state: bool,
    form: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The contract of `torch.ops.linattn.quadratic_fwd` (ops.py); nothing is saved beyond out and the row sums."""
    problem = _problem(q, k, v, key_mask, is_causal, q_offset, scale, c0, c1, c2, normalize)
    out = empty_in_storage_order(q, v.shape[3])
    row_sums, state = attention.forward(problem, out, cu_seqlens, initial_state, return_state, form, chunk_size)
    return out, row_sums, state, []


def backward(
    dout: Tensor,
    dstate: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_sums: Tensor,
    saved: list[Tensor],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: list[Tensor],
    is_causal: bool,
    q_offset: int,
    scale: float,
    c0: float,
    c1: float,
    c2: float,
    normalize: bool,
    form: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The contract of `torch.ops.linattn.quadratic_bwd` (ops.py)."""
    problem = _problem(q, k, v, key_mask, is_causal, q_offset, scale, c0, c1, c2, normalize)
    return attention.backward(problem, cu_seqlens, initial_state, dstate, dout, out, row_sums, form, chunk_size)
