"""One call: packed sequences apart, the form chosen, the state carried through."""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocation import empty_row_sums
from ..stateful import Plan
from ..tiles import Gradients, Outputs, sequences, spans
from . import direct, scan
from .few_keys import FewKeyRows
from .problem import Problem
from .state import KeySumGradients, KeySums

State = list[Tensor]


def forward(
    problem: Problem, out: Tensor, cu_seqlens: Tensor | None, initial_state: State, return_state: bool, plan: Plan
) -> tuple[Tensor, State]:
    """Fill out; return row sums and the state after all keys (empty unless asked for)."""
    row_sums = empty_row_sums(problem.q)
    states = []
    for part, rows, i in sequences(problem, cu_seqlens):
        before = _of_sequence(initial_state, i)
        states.append(_forward_one(part, out[:, :, rows], row_sums[:, :, rows], before, return_state, plan))
    return row_sums, joined(states)


def backward(
    problem: Problem,
    cu_seqlens: Tensor | None,
    initial_state: State,
    dstate: State,
    dout: Tensor,
    out: Tensor,
    row_sums: Tensor,
    want_initial: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, State]:
    """Return dq, dk, dv and the gradients to the initial state (without n; empty if there was none)."""
    outputs = Outputs.empty(problem)
    dinitial = []
    for part, rows, i in sequences(problem, cu_seqlens):
        states = (_of_sequence(initial_state, i), _of_sequence(dstate, i))
        whole = (dout[:, :, rows], out[:, :, rows], row_sums[:, :, rows])
        gradients, dbefore = _backward_one(part, *states, *whole, want_initial and bool(initial_state), plan)
        dinitial.append(dbefore)
        outputs.store(rows, gradients)
    return *outputs, joined(dinitial)


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
    return gradients, dsums.canonical() if want_initial else []
