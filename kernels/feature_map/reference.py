"""Feature-map linear attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 1 in
phi(q).phi(k)."""

from __future__ import annotations

from torch import Tensor

from ..common.allocation import accumulation_dtype, empty_in_storage_order
from ..common.polynomial import attention
from ..common.polynomial.problem import Problem
from .maps import MAPS


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
    feature_map: str,
    normalize: bool,
) -> Problem:
    phi, _ = MAPS[feature_map]
    dtype = accumulation_dtype(q.dtype)
    q, k = (x if feature_map == "identity" else phi(x.to(dtype)) for x in (q, k))
    return Problem(
        q, k, v, key_mask, is_causal, q_offset, scale, coefficients=(0.0, 1.0, 0.0), normalize=normalize, degree=1
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
    feature_map: str,
    normalize: bool,
    return_state: bool,
    form: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The contract of `torch.ops.linattn.feature_map_fwd` (ops.py); nothing is saved beyond out and the row sums."""
    problem = _problem(q, k, v, key_mask, is_causal, q_offset, scale, feature_map, normalize)
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
    feature_map: str,
    normalize: bool,
    form: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The contract of `torch.ops.linattn.feature_map_bwd` (ops.py)."""
    problem = _problem(q, k, v, key_mask, is_causal, q_offset, scale, feature_map, normalize)
    dphi_q, dphi_k, dv, dinitial = attention.backward(
        problem, cu_seqlens, initial_state, dstate, dout, out, row_sums, form, chunk_size
    )
    dq, dk = _pullback(feature_map, dphi_q, q), _pullback(feature_map, dphi_k, k)
    if key_mask is not None:  # padding may hold NaN, where the map has no slope
        dk.masked_fill_(~key_mask[:, None, :, None], 0)
    return dq, dk, dv, dinitial


def _pullback(feature_map: str, dphi: Tensor, x: Tensor) -> Tensor:
    _, slope = MAPS[feature_map]
    return empty_in_storage_order(x, x.shape[3]).copy_(dphi * slope(x.to(dphi.dtype)))
