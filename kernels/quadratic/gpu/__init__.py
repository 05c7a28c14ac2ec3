"""The Triton backend of the quadratic ops: which form a call runs on (`direct`, `chunked`, `decode`)."""

from __future__ import annotations

from torch import Tensor

from ...common.stateful import Plan
from ..contract import Options
from . import direct

State = list[Tensor]


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
    return direct.forward(q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, save, plan)


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
    inputs = (dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state)
    return direct.backward(*inputs, options, wanted, plan)


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """The kernels that a call runs, and their configuration."""
    return direct.describe(q, k, v, is_causal, form)
