"""Quadratic-kernel attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 2 in q.k.

The contract of `forward` and `backward` is that of kernels/common/stateful.py; nothing is saved beyond out and l.
"""

from __future__ import annotations

from torch import Tensor

from ..common.allocation import empty_in_storage_order
from ..common.polynomial import attention
from ..common.polynomial.problem import Problem
from ..common.stateful import Plan
from .contract import Options

State = list[Tensor]


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Options) -> Problem:
    is_causal, q_offset, scale, c0, c1, c2, normalize = options
    return Problem(
        q, k, v, key_mask, is_causal, q_offset, scale, coefficients=(c0, c1, c2), normalize=normalize, degree=2
    )


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
    return attention.backward(problem, cu_seqlens, initial_state, dstate, dout, out, l, wanted[3], plan)
