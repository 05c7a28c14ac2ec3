"""The direct form: every score is computed, a tile at a time, and none is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linattn.kernels.common.reference.tiles import TileGradients, spans

if TYPE_CHECKING:
    from linattn.kernels.common.reference.problem import Problem
    from linattn.kernels.common.reference.state import KeySumGradients, KeySums


def forward(problem: Problem, out: Tensor, row_sums: Tensor, sums: KeySums) -> None:
    """Fill out and row_sums. `sums` holds keys that precede all of this call's and that every row sees."""
    length = problem.tile_length()
    for i0, i1 in spans(0, problem.Tq, length):
        x = problem.queries(i0, i1)
        acc, l = sums.read(x) if sums.any else problem.no_sums(x)
        for j0, j1 in spans(0, problem.visible_keys(i1), length):
            add_tile(problem, x, (i0, i1), (j0, j1), acc, l)
        problem.store(out, row_sums, i0, i1, acc, l)


class Rows(NamedTuple):
    """A tile of queries (scaled) and the gradients that reach it."""

    i0: int
    i1: int
    x: Tensor
    do: Tensor
    delta: Tensor


def load_rows(problem: Problem, dout: Tensor, out: Tensor, row_sums: Tensor, i0: int, i1: int) -> Rows:
    """Load queries i0..i1 and the gradients that reach them."""
    return Rows(i0, i1, problem.queries(i0, i1), *problem.row_gradients(dout, out, row_sums, i0, i1))


def backward(
    problem: Problem,
    dout: Tensor,
    out: Tensor,
    row_sums: Tensor,
    sums: KeySums,
    dsums: KeySumGradients,
    *,
    want_initial: bool,
) -> TileGradients:
    """Return dq, dk, dv. `sums` holds keys before this call's; `dsums` starts as the gradients to the sums after it
    and ends as those to the sums before it.
    """
    length = problem.tile_length()
    gradients = TileGradients.zeros(problem)
    if dsums.any:
        for j0, j1 in spans(0, problem.Tk, length):
            gradients.add_key(j0, j1, *dsums.key_gradient(j0, j1))
    for i0, i1 in spans(0, problem.Tq, length):
        rows = load_rows(problem, dout, out, row_sums, i0, i1)
        dx = torch.zeros_like(rows.x)
        if sums.any:
            dx += sums.query_gradient(rows.x, rows.do, rows.delta)
            if want_initial:
                dsums.add(rows.x, rows.do, rows.delta)
        for j0, j1 in spans(0, problem.visible_keys(i1), length):
            add_tile_gradients(problem, rows, j0, j1, dx, gradients)
        gradients.add_query(i0, i1, dx, problem.scale)
    return gradients


def add_tile(problem: Problem, x: Tensor, i: tuple[int, int], j: tuple[int, int], acc: Tensor, l: Tensor) -> None:
    """Add to the accumulators of queries x, at i[0]..i[1], what keys j[0]..j[1] give them."""
    p, _ = problem.similarity(x, problem.keys(*j))
    problem.hide(p, problem.hidden(*i, *j))
    l += p.sum(-1)
    acc.baddbmm_(p, problem.values(*j))


def add_tile_gradients(problem: Problem, rows: Rows, j0: int, j1: int, dx: Tensor, gradients: TileGradients) -> None:
    """Add the gradients of one score tile: dS = p'(s) (dO' V^T - delta), dx = dS K, dK = dS^T x, dV = P^T dO'."""
    k, v = problem.keys(j0, j1), problem.values(j0, j1)
    hidden = problem.hidden(rows.i0, rows.i1, j0, j1)
    p, slope = problem.similarity(rows.x, k)
    gradients.dv[:, j0:j1].baddbmm_(problem.hide(p, hidden).mT, rows.do)
    ds = torch.baddbmm(-rows.delta[..., None], rows.do, v.mT)
    ds.mul_(problem.coefficients[1] if slope is None else slope)
    problem.hide(ds, hidden)
    dx.baddbmm_(ds, k)
    gradients.dk[:, j0:j1].baddbmm_(ds.mT, rows.x)
