"""The chunked and the recurrent form: keys are folded into sums, chunk by chunk, and rows read the sums.

Only the scores inside a chunk are computed. The recurrent form is the same scan with chunks of one key.
Time O(N (C M + c (D + M))) for chunk length c; memory O(N (D + M)) for the gradients plus one set of sums, which the
backward pass computes again instead of keeping one set a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linattn.kernels.common.op.conditioning import DIRECT_KEYS
from linattn.kernels.common.reference.direct import Rows, add_tile, add_tile_gradients, load_rows
from linattn.kernels.common.reference.features import features_for
from linattn.kernels.common.reference.tiles import TileGradients, spans

if TYPE_CHECKING:
    from linattn.kernels.common.reference.problem import Problem
    from linattn.kernels.common.reference.state import KeySumGradients, KeySums

CHUNK_ELEMENTS = 1 << 23  # features held at once: 32 MiB in fp32


class Step(NamedTuple):
    """Rows i0..i1 read the sums and the scores of keys j0..j1, which are then folded in. Either range may be empty."""

    i0: int
    i1: int
    j0: int
    j1: int


def default_chunk(problem: Problem) -> int:
    """The largest power of two from 32 on for which the features of a chunk, over all heads, fit CHUNK_ELEMENTS."""
    length = 256 if problem.is_causal else 512  # causal chunks pay for the scores inside
    per_row = problem.batch * problem.groups * features_for(problem.D, problem.degree).size
    while length > 32 and per_row * length > CHUNK_ELEMENTS:
        length //= 2
    return length


def schedule(problem: Problem, chunk: int) -> list[Step]:
    """Cut a call into steps. Row i sees keys up to i + q_offset, so its own chunk is the one that holds that key."""
    Tq, Tk = problem.Tq, problem.Tk
    if not problem.is_causal:
        folds = [Step(0, 0, j0, j1) for j0, j1 in spans(0, Tk, chunk)]
        return folds + [Step(i0, i1, Tk, Tk) for i0, i1 in spans(0, Tq, chunk)]

    def row(j: int) -> int:
        return min(max(j - problem.q_offset, 0), Tq)

    first = min(max(chunk, DIRECT_KEYS if problem.degree == 2 else 1), Tk)
    steps = [Step(i0, i1, 0, 0) for i0, i1 in spans(0, row(0), chunk)]
    for j0, j1 in [(0, first), *spans(first, Tk, chunk)]:
        steps.append(Step(row(j0), row(j1), j0, j1))
    return steps + [Step(i0, i1, Tk, Tk) for i0, i1 in spans(row(Tk), Tq, chunk)]


def read_by_later_rows(steps: list[Step]) -> int:
    """The index of the last step whose rows read the sums: keys from there on need not be folded in."""
    return max((index for index, step in enumerate(steps) if step.i1 > step.i0), default=0)


def forward(problem: Problem, out: Tensor, row_sums: Tensor, sums: KeySums, chunk: int, keep: bool) -> None:
    """Fill out and row_sums; fold all keys into `sums` if they are to be kept, else only those that later rows read."""
    steps = schedule(problem, chunk)
    last_read = read_by_later_rows(steps)
    for index, (i0, i1, j0, j1) in enumerate(steps):
        if i1 > i0:
            x = problem.queries(i0, i1)
            acc, l = sums.read(x) if sums.any else problem.no_sums(x)
            if j1 > j0:
                add_tile(problem, x, (i0, i1), (j0, j1), acc, l)
            problem.store(out, row_sums, i0, i1, acc, l)
        if j1 > j0 and (keep or index < last_read):
            sums.add(j0, j1)


def backward(
    problem: Problem,
    dout: Tensor,
    out: Tensor,
    row_sums: Tensor,
    sums: KeySums,
    dsums: KeySumGradients,
    *,
    chunk: int,
    want_initial: bool,
) -> TileGradients:
    """Return dq, dk, dv. `sums` starts as before the call; `dsums` starts as the gradients to the sums after it and,
    if these are wanted, ends as those to the sums before it.
    """
    steps = schedule(problem, chunk)
    last_read = read_by_later_rows(steps)
    gradients = TileGradients.zeros(problem)
    for index, (i0, i1, j0, j1) in enumerate(steps[: last_read + 1]):  # downhill: rows read the sums again
        if i1 > i0 and sums.any:
            rows = load_rows(problem, dout, out, row_sums, i0, i1)
            gradients.add_query(i0, i1, sums.query_gradient(rows.x, rows.do, rows.delta), problem.scale)
        if j1 > j0 and index < last_read:
            sums.add(j0, j1)
    first_fold = next((index for index, step in enumerate(steps) if step.j1 > step.j0), 0)
    for index, (i0, i1, j0, j1) in reversed(
        list(enumerate(steps))
    ):  # uphill: gradients of later queries reach the keys
        if j1 > j0 and dsums.any:
            gradients.add_key(j0, j1, *dsums.key_gradient(j0, j1))
        if i1 > i0:
            rows = load_rows(problem, dout, out, row_sums, i0, i1)
            if j1 > j0:
                add_chunk_gradients(problem, rows, j0, j1, gradients)
            if want_initial or index > first_fold:
                dsums.add(rows.x, rows.do, rows.delta)
    return gradients


def add_chunk_gradients(problem: Problem, rows: Rows, j0: int, j1: int, gradients: TileGradients) -> None:
    """Add the gradients of the scores inside one chunk."""
    dx = torch.zeros_like(rows.x)
    add_tile_gradients(problem, rows, j0, j1, dx, gradients)
    gradients.add_query(rows.i0, rows.i1, dx, problem.scale)
