"""Feature-map linear attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 1 in
phi(q).phi(k).

The contract of `forward` and `backward` is that of kernels/common/stateful.py; nothing is saved beyond out and l.
"""

from __future__ import annotations

from torch import Tensor

from ..common.allocation import accumulation_dtype, empty_in_storage_order
from ..common.polynomial import attention
from ..common.polynomial.problem import Problem
from ..common.stateful import Plan
from .contract import Options
from .maps import MAPS

State = list[Tensor]
LINEAR = (0.0, 1.0, 0.0)


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Options) -> Problem:
    is_causal, q_offset, scale, name, normalize = options
    dtype = accumulation_dtype(q.dtype)
    if name != "identity":
        phi, _ = MAPS[name]
        q, k = phi(q.to(dtype)), phi(k.to(dtype))
    return Problem(q, k, v, key_mask, is_causal, q_offset, scale, coefficients=LINEAR, normalize=normalize, degree=1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    return_state: bool,
    save: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, State, State]:
    out = empty_in_storage_order(q, v.shape[3])
    problem = _problem(q, k, v, key_mask, options)
    return out, *attention.forward(problem, out, cu_seqlens, initial_state, return_state, plan), []


def backward(
    dout: Tensor,
    dstate: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    l: Tensor,
    saved: State,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    wanted: list[bool],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, State]:
    problem = _problem(q, k, v, key_mask, options)
    dphi_q, dphi_k, dv, dinitial = attention.backward(
        problem, cu_seqlens, initial_state, dstate, dout, out, l, wanted[3], plan
    )
    dq, dk = _pullback(options.feature_map, dphi_q, q), _pullback(options.feature_map, dphi_k, k)
    if key_mask is not None:  # padding may hold NaN, where the map has no slope
        dk.masked_fill_(~key_mask[:, None, :, None], 0)
    return dq, dk, dv, dinitial


def _pullback(name: str, dphi: Tensor, x: Tensor) -> Tensor:
    _, slope = MAPS[name]
    return empty_in_storage_order(x, x.shape[3]).copy_(dphi * slope(x.to(dphi.dtype)))
