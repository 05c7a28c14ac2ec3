"""One call: packed sequences apart, the form chosen, the state carried through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.conditioning import DIRECT_KEYS
from linattn.kernels.common.reference import direct, scan
from linattn.kernels.common.reference.few_keys import FewKeyRows
from linattn.kernels.common.reference.state import KeySumGradients, KeySums
from linattn.kernels.common.reference.tiles import InputGradients, TileGradients, sequences, spans

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs, Plan
    from linattn.kernels.common.reference.problem import Problem

State = list[Tensor]


def forward(problem: Problem, inputs: ForwardInputs) -> Outputs:
    """Compute the results of an op with a state, whose similarity and features `problem` has; nothing is saved."""
    out, row_sums = empty_in_storage_order(inputs.q, inputs.v.shape[3]), empty_row_sums(inputs.q)
    states = []
    for part, rows, i in sequences(problem, inputs.cu_seqlens):
        before = _of_sequence(inputs.initial_state, i)
        states.append(
            _forward_one(part, out[:, :, rows], row_sums[:, :, rows], before, inputs.return_state, inputs.plan)
        )
    return out, row_sums, concat_states(states), []


def backward(problem: Problem, inputs: BackwardInputs) -> Gradients:
    """Compute the gradients of an op with a state; those of q and k are of the features that `problem` holds."""
    dout, out, l = inputs.dout, inputs.out, inputs.l
    gradients, wants_initial = InputGradients.empty(problem), inputs.needs_grad[3] and bool(inputs.initial_state)
    dinitial = []
    for part, rows, i in sequences(problem, inputs.cu_seqlens):
        states = (_of_sequence(inputs.initial_state, i), _of_sequence(inputs.dstate, i))
        whole = (dout[:, :, rows], out[:, :, rows], l[:, :, rows])
        accumulated, dbefore = _backward_one(part, *states, *whole, want_initial=wants_initial, plan=inputs.plan)
        dinitial.append(dbefore)
        gradients.store(rows, accumulated)
    return *gradients, concat_states(dinitial)


def _of_sequence(state: State, i: int | None) -> State:
    return state if i is None else [x[i : i + 1] for x in state]


def concat_states(states: list[State]) -> State:
    """Return the states of all sequences as one."""
    return states[0] if len(states) == 1 else [torch.cat(tensors) for tensors in zip(*states, strict=True)]


def runs_direct(problem: Problem, form: str, initial_state: State) -> bool:
    """Return whether scores are computed for all pairs: on request, or because no row sees enough keys for the sums."""
    too_few = problem.degree == 2 and problem.Tk < DIRECT_KEYS and not initial_state
    return form == "direct" or too_few


def chunk_length(problem: Problem, plan: Plan) -> int:
    """Return the keys of a chunk: one in the recurrent form."""
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
    *,
    want_initial: bool,
    plan: Plan,
) -> tuple[TileGradients, State]:
    sums, dsums = KeySums(problem, before), KeySumGradients(problem, dafter)
    if runs_direct(problem, plan.form, before):
        gradients = direct.backward(problem, dout, out, row_sums, sums, dsums, want_initial=want_initial)
    else:
        few = FewKeyRows.find(problem, before)
        others = few.others(dout) if few else dout
        chunk = chunk_length(problem, plan)
        gradients = scan.backward(problem, others, out, row_sums, sums, dsums, chunk=chunk, want_initial=want_initial)
        if few:
            few.backward(dout, out, row_sums, gradients, dsums)
    return gradients, dsums.canonical_sums() if want_initial else []
