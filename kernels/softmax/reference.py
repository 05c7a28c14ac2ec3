"""Softmax attention in plain PyTorch: any device, fp64 too. Memory O(N (D + M)) and one score tile, forward and
backward.

Forward keeps a running maximum m and rescales (Milakov & Gimelshein 2018; Rabe & Staats 2021); backward recomputes
P = exp(S - lse) tile by tile (Dao et al. 2022): dS = P * (dO V^T - delta), delta = rowsum(dO * out).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.reference.tiles import InputGradients, TileGradients, Tiles, divided, sequences, spans

if TYPE_CHECKING:
    from linattn.kernels.softmax.contract import BackwardInputs, ForwardInputs


def forward(inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
    """Compute out and the log-sum-exps."""
    q, k, v, key_mask, cu_seqlens, is_causal, q_offset, scale = inputs
    out, lse = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
    for tiles, rows, _ in sequences(Tiles(q, k, v, key_mask, is_causal, q_offset, scale), cu_seqlens):
        length = tiles.tile_length()
        for i0, i1 in spans(0, tiles.Tq, length):
            acc, l, m = _rows_forward(tiles, i0, i1, length)
            out[:, :, rows][:, :, i0:i1].copy_(tiles.unfold(divided(acc, l)))
            lse[:, :, rows][:, :, i0:i1].copy_(tiles.unfold(m + l.log()))
    return out, lse


def _rows_forward(tiles: Tiles, i0: int, i1: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    x = tiles.queries(i0, i1)
    acc, l = tiles.no_sums(x)
    m = torch.full_like(l, -math.inf)
    for j0, j1 in spans(0, tiles.visible_keys(i1), length):
        s = tiles.hide(x @ tiles.keys(j0, j1).mT, tiles.hidden(i0, i1, j0, j1), -math.inf)
        m_new = torch.maximum(m, s.amax(-1))
        finite = m_new.masked_fill(m_new == -math.inf, 0)  # a row that has seen no key yet: exp(-inf - 0) = 0
        p, decay = s.sub_(finite[..., None]).exp_(), (m - finite).exp()
        l = l * decay + p.sum(-1)
        acc = torch.baddbmm(acc * decay[..., None], p, tiles.values(j0, j1))
        m = m_new
    return acc, l, m


def backward(inputs: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv."""
    dout, q, k, v, out, lse, key_mask, cu_seqlens, is_causal, q_offset, scale = inputs
    tiles = Tiles(q, k, v, key_mask, is_causal, q_offset, scale)
    outputs = InputGradients.empty(tiles)
    for part, rows, _ in sequences(tiles, cu_seqlens):
        outputs.store(rows, _sequence_backward(part, dout[:, :, rows], out[:, :, rows], lse[:, :, rows]))
    return outputs


def _sequence_backward(tiles: Tiles, dout: Tensor, out: Tensor, lse: Tensor) -> TileGradients:
    gradients, length = TileGradients.zeros(tiles), tiles.tile_length()
    for i0, i1 in spans(0, tiles.Tq, length):
        x, do = tiles.queries(i0, i1), tiles.fold(dout[:, :, i0:i1])
        delta = (do * tiles.fold(out[:, :, i0:i1])).sum(-1, keepdim=True)
        shift = tiles.fold(lse[:, :, i0:i1])[..., None]
        shift = shift.masked_fill(shift == -math.inf, 0)
        dx = torch.zeros_like(x)
        for j0, j1 in spans(0, tiles.visible_keys(i1), length):
            k, v = tiles.keys(j0, j1), tiles.values(j0, j1)
            p = tiles.hide((x @ k.mT).sub_(shift).exp_(), tiles.hidden(i0, i1, j0, j1))
            ds = torch.baddbmm(-delta, do, v.mT).mul_(p)
            gradients.add_key(j0, j1, ds.mT @ x, p.mT @ do)
            dx.baddbmm_(ds, k)
        gradients.add_query(i0, i1, dx, tiles.scale)
    return gradients
