"""One call: packed sequences apart, the form chosen, the state carried through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.reference import direct, scan
from linattn.kernels.common.reference.few_keys import FewKeyRows
from linattn.kernels.common.reference.state import KeySumGradients, KeySums
from linattn.kernels.common.reference.tiles import Gradients, Outputs, sequences, spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from linattn.kernels.common.op.stateful import Plan
    from linattn.kernels.common.reference.problem import Problem

State = list[Tensor]


class Reference:
    """The backend "reference" of an op with a state (contract: kernels/common/op/stateful.py); it saves nothing.

    `problem_of(q, k, v, key_mask, options)` says what similarity the op's options stand for. Where it maps q and k,
    `pullback(options, dphi, x)` takes a gradient to what it made of x on to x.
    """

    def __init__(self, problem_of: Callable[..., Problem], pullback: Callable[..., Tensor] | None = None) -> None:
        self.problem_of, self.pullback = problem_of, pullback

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        initial_state: State,
        options: tuple,
        return_state: bool,
        save: bool,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, State, State]:
        problem = self.problem_of(q, k, v, key_mask, options)
        out, row_sums = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
        states = []
        for part, rows, i in sequences(problem, cu_seqlens):
            before = _of_sequence(initial_state, i)
            states.append(_forward_one(part, out[:, :, rows], row_sums[:, :, rows], before, return_state, plan))
        return out, row_sums, joined(states), []

    def backward(
        self,
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
        options: tuple,
        wanted: list[bool],
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        problem = self.problem_of(q, k, v, key_mask, options)
        outputs, want_initial = Outputs.empty(problem), wanted[3] and bool(initial_state)
        dinitial = []
        for part, rows, i in sequences(problem, cu_seqlens):
            states = (_of_sequence(initial_state, i), _of_sequence(dstate, i))
            whole = (dout[:, :, rows], out[:, :, rows], l[:, :, rows])
            gradients, dbefore = _backward_one(part, *states, *whole, want_initial, plan)
            dinitial.append(dbefore)
            outputs.store(rows, gradients)
        dq, dk, dv = outputs
        if self.pullback is not None:
            dq, dk = self.pullback(options, dq, q), self.pullback(options, dk, k)
            if key_mask is not None:  # padding may hold NaN, where a map has no slope
                dk.masked_fill_(~key_mask[:, None, :, None], 0)
        return dq, dk, dv, joined(dinitial)


def _of_sequence(state: State, i: int | None) -> State:
    return state if i is None else [x[i : i + 1] for x in state]


def joined(states: list[State]) -> State:
    """The states of all sequences as one."""
    return states[0] if len(states) == 1 else [torch.cat(tensors) for tensors in zip(*states, strict=True)]


def runs_direct(problem: Problem, form: str, initial_state: State) -> bool:
    """Whether scores are computed for all pairs: on request, or because no row sees enough keys for the sums."""
    too_few = problem.degree == 2 and problem.Tk < scan.DIRECT_KEYS and not initial_state
    return form == "direct" or too_few


def chunk_length(problem: Problem, plan: Plan) -> int:
    return 1 if plan.form == "recurrent" else plan.chunk_size or scan.default_chunk(problem)


def _forward_one(
    problem: Problem, out: Tensor, row_sums: Tensor, before: State, return_state: bool, plan: Plan
) -> State:
    sums = KeySums(problem, before)
    if runs_direct(problem, plan.form, before):
        direct.forward(problem, out, row_sums, sums)
        if return_state:
            for j0, j1 in spans(0, problem.Tk, scan.default_chunk(problem)):
                sums.add(j0, j1)
    else:
        scan.forward(problem, out, row_sums, sums, chunk_length(problem, plan), keep=return_state)
        few = FewKeyRows.find(problem, before)
        if few:
            few.forward(out, row_sums)
    return sums.canonical() if return_state else []


def _backward_one(
    problem: Problem,
    before: State,
    dafter: State,
    dout: Tensor,
    out: Tensor,
    row_sums: Tensor,
    want_initial: bool,
    plan: Plan,
) -> tuple[Gradients, State]:
    sums, dsums = KeySums(problem, before), KeySumGradients(problem, dafter)
    if runs_direct(problem, plan.form, before):
        gradients = direct.backward(problem, dout, out, row_sums, sums, dsums, want_initial)
    else:
        few = FewKeyRows.find(problem, before)
        others = few.others(dout) if few else dout
        chunk = chunk_length(problem, plan)
        gradients = scan.backward(problem, others, out, row_sums, sums, dsums, chunk, want_initial)
        if few:
            few.backward(dout, out, row_sums, gradients, dsums)
    return gradients, dsums.canonical_sums() if want_initial else []
