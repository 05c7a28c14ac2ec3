"""The Triton backend of the quadratic ops: which kernels a call runs on.

Direct form: `direct`, or `chunked` where a state stands before or after. Chunked form: `chunked`. A few tokens beside a
state: `step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.quadratic.gpu import chunked, direct, step

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import Plan
    from linattn.kernels.quadratic.contract import Options

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
    if step.runs(q, k, cu_seqlens, initial_state):
        return step.forward(q, k, v, key_mask, initial_state, options, return_state, plan)
    if plan.form == "chunked" or initial_state:
        plan = _scores_unless_chunked(plan)
        return chunked.forward(q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, save, plan)
    out, l = direct.forward(q, k, v, key_mask, cu_seqlens, options)
    state = chunked.state_after(q, k, v, key_mask, cu_seqlens, options) if return_state else []
    return out, l, state, []


def saved_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    plan: Plan,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` saves."""
    if step.runs(q, k, cu_seqlens, initial_state) or (plan.form != "chunked" and not initial_state):
        return []
    return chunked.saved_like(q, k, v, cu_seqlens, initial_state, options, _scores_unless_chunked(plan))


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
    if plan.form == "chunked" or initial_state or dstate:
        inputs = (dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state)
        return chunked.backward(*inputs, options, wanted, _scores_unless_chunked(plan))
    return *direct.backward(dout, q, k, v, out, l, key_mask, cu_seqlens, options, wanted), []


def _scores_unless_chunked(plan: Plan) -> Plan:
    """The recurrent form of one token is the direct form."""
    return plan if plan.form == "chunked" else plan._replace(form="direct")


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """The kernels that a call runs, and their configuration."""
    if form == "recurrent":
        return step.describe(q, v)
    return chunked.describe(q, k, v, is_causal) if form == "chunked" else direct.describe(q, v)
