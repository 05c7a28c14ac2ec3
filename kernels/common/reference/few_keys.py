"""Rows that have seen fewer than 16 keys because of a key mask, computed from those keys' scores.

(1 + s)^2 touches zero, so a row's sum over few keys may be far smaller than the terms it would be assembled from in
the chunked form: its error grows like kappa = sum (1 + |s|-bound)^2 / l. From 16 keys on a vanishing sum is
improbable. Without a mask such rows lie in the first chunk, where scores are computed anyway; padding on the left
moves them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.op.conditioning import DIRECT_KEYS
from linattn.kernels.common.reference import direct
from linattn.kernels.common.reference.state import KeySumGradients, KeySums

if TYPE_CHECKING:
    from linattn.kernels.common.reference.problem import Problem
    from linattn.kernels.common.reference.tiles import TileGradients


class FewKeyRows:
    """The rows concerned and the small direct problem of their keys: the first 15 real ones of each batch element."""

    def __init__(self, problem: Problem, key_mask: Tensor, few: Tensor, before: list[Tensor]) -> None:
        self.few, self.before = few[:, None], before
        self.Tq = int(few.any(0).nonzero().max()) + 1
        order = (~key_mask).to(torch.int8).argsort(dim=1, stable=True)
        self.index = order[:, : DIRECT_KEYS - 1]
        self.problem = dataclasses.replace(
            problem,
            q=problem.q[:, :, : self.Tq],
            k=problem.k.gather(2, self._per_element(problem.k)),
            v=problem.v.gather(2, self._per_element(problem.v)),
            key_mask=key_mask.gather(1, self.index),
            key_positions=self.index,
        )

    def _per_element(self, rows: Tensor) -> Tensor:
        return self.index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])

    @staticmethod
    def find(problem: Problem, before: list[Tensor]) -> FewKeyRows | None:
        """None if every row has seen at least 16 keys, or some of them stand in the state `before` this call."""
        if problem.degree == 1 or (problem.key_mask is None and not before):
            return None
        key_mask = problem.key_mask
        if key_mask is None:  # a state may be empty: then its rows are as poor in keys as those under a mask
            key_mask = torch.ones(problem.k.shape[0], problem.Tk, dtype=torch.bool, device=problem.k.device)
        seen = key_mask.cumsum(1)
        if problem.is_causal:
            last = torch.arange(problem.Tq, device=seen.device) + problem.q_offset
            seen = seen[:, last.clamp(0, problem.Tk - 1)].masked_fill(last < 0, 0)
        else:
            seen = seen[:, -1:].expand(-1, problem.Tq)
        few = seen < DIRECT_KEYS
        if before:
            few = few & (before[0] == 0)[:, None]
        return FewKeyRows(problem, key_mask, few, before) if few.any() else None

    def forward(self, out: Tensor, row_sums: Tensor) -> None:
        """Overwrite the rows concerned."""
        out, row_sums, few = out[:, :, : self.Tq], row_sums[:, :, : self.Tq], self.few[:, :, : self.Tq]
        mine, sums = torch.empty_like(out), torch.empty_like(row_sums)
        direct.forward(self.problem, mine, sums, KeySums(self.problem, self.before))
        out.copy_(torch.where(few[..., None], mine, out))
        row_sums.copy_(torch.where(few, sums, row_sums))

    def others(self, dout: Tensor) -> Tensor:
        """The gradient without the rows concerned."""
        return dout.masked_fill(self.few[..., None], 0)

    def backward(
        self, dout: Tensor, out: Tensor, row_sums: Tensor, gradients: TileGradients, dsums: KeySumGradients
    ) -> None:
        """Add the gradients of the rows concerned; `dsums` are those to the sums before this call."""
        dout = dout[:, :, : self.Tq].masked_fill(~self.few[:, :, : self.Tq, None], 0)
        sums, mine_sums = KeySums(self.problem, self.before), KeySumGradients(self.problem)
        rows = (dout, out[:, :, : self.Tq], row_sums[:, :, : self.Tq])
        mine = direct.backward(self.problem, *rows, sums, mine_sums, want_initial=True)
        if mine_sums.any:
            dsums.merge(mine_sums)
        gradients.dq[:, :, : self.Tq] += mine.dq
        B, Hkv = self.problem.k.shape[:2]
        for whole, part in ((gradients.dk, mine.dk), (gradients.dv, mine.dv)):
            whole, part = whole.unflatten(0, (B, Hkv)), part.unflatten(0, (B, Hkv))
            whole.scatter_add_(2, self._per_element(part), part)
