"""Sums in memory: canonical states and the block layout, and the tables of boundaries (places.py) where masks, short
or packed sequences make them irregular.

Products lie in 16 x 16 blocks, block A (A + 1) / 2 + B for rows A and columns B <= A of the matrix x x^T, feature
(i, j) of it at 16 i + j with i in B and j in A: padded to BLOCK_D and BLOCK_M. A record is Gram matrix, x y^T, x, y and
the count, with 15 zeros after it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from linattn.kernels.quadratic.gpu.places import NOWHERE

FEW_KEYS = 16
"""Rows that have seen fewer keys are ill-conditioned through sums: their scores are computed."""

State = list[Tensor]


def features(BLOCK_D: int) -> int:
    return BLOCK_D * (BLOCK_D + 16) // 2


def record_size(BLOCK_D: int, BLOCK_M: int) -> int:
    return BLOCK_D * BLOCK_D + BLOCK_D * BLOCK_M + BLOCK_D + BLOCK_M + 16


# Products: kkv [sequences, Hkv, D (D + 1) / 2, M], pair a >= b at a (a + 1) / 2 + b.


def blocks_of(kkv: Tensor, D: int, BLOCK_D: int, BLOCK_M: int) -> Tensor:
    """Canonical products in blocks: `[sequences, Hkv, features, BLOCK_M]`."""
    inside, pair = _pair_of_feature(D, BLOCK_D, kkv.device)
    return pad(kkv.index_select(2, pair) * inside[:, None], (0, BLOCK_M - kkv.shape[3]))


def products_of(blocks: Tensor, D: int, M: int) -> Tensor:
    """The canonical products of sums in blocks, the inverse of `blocks_of`."""
    return blocks.index_select(2, _feature_of_pair(D, blocks.device))[..., :M]


def pulled_blocks_of(dkkv: Tensor, D: int, BLOCK_D: int, BLOCK_M: int) -> Tensor:
    """The gradient to canonical products as sums over rows carry it: twice that of a square x_a x_a, once that of a
    product x_a x_b, which is written twice on blocks of the diagonal; whoever reads these blocks takes the half.
    """
    return blocks_of(dkkv * _weight_of_pair(D, dkkv.device)[:, None], D, BLOCK_D, BLOCK_M)


def pulled_products_of(blocks: Tensor, D: int, M: int) -> Tensor:
    return products_of(blocks, D, M) / _weight_of_pair(D, blocks.device)[:, None]


@functools.lru_cache(maxsize=32)
def _pair_of_feature(D: int, BLOCK_D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    A = torch.arange(BLOCK_D // 16).repeat_interleave(256 * torch.arange(1, BLOCK_D // 16 + 1))
    place = torch.arange(features(BLOCK_D)) - A * (A + 1) // 2 * 256
    i, j = place // 16, A * 16 + place % 16
    a, b = torch.maximum(i, j), torch.minimum(i, j)
    inside = a < D
    return inside.float().to(device), torch.where(inside, a * (a + 1) // 2 + b, 0).to(device)


@functools.lru_cache(maxsize=32)
def _feature_of_pair(D: int, device: torch.device) -> Tensor:
    a, b = torch.tril_indices(D, D)
    A = a // 16
    return (A * (A + 1) // 2 * 256 + b * 16 + a % 16).to(device)


@functools.lru_cache(maxsize=32)
def _weight_of_pair(D: int, device: torch.device) -> Tensor:
    a, b = torch.tril_indices(D, D)
    return (1.0 + (a == b)).to(device)


# Records.


def record_of(sums: State, n: Tensor | None, BLOCK_D: int, BLOCK_M: int) -> Tensor:
    """k_sum, kk, v_sum, kv (and kkv, unused) as a record `[sequences, Hkv, size]`. kk enters as (kk + kk^T) / 2."""
    k_sum, kk, v_sum, kv = sums[:4]
    D, M = kv.shape[2:]
    gram = pad((kk + kk.mT) / 2, (0, BLOCK_D - D, 0, BLOCK_D - D))
    linear = pad(kv, (0, BLOCK_M - M, 0, BLOCK_D - D))
    count = torch.zeros_like(k_sum[..., :1])
    if n is not None:
        count = count + n[:, None, None]
    parts = (gram.flatten(2), linear.flatten(2), pad(k_sum, (0, BLOCK_D - D)), pad(v_sum, (0, BLOCK_M - M)))
    return torch.cat((*parts, pad(count, (0, 15))), 2)


def sums_of(record: Tensor, before: State, D: int, M: int, BLOCK_D: int, BLOCK_M: int) -> State:
    """k_sum, kk, v_sum, kv of a record. `before`: what it started from, whose kk may not be symmetric."""
    gram, linear, k_sum, v_sum, _ = record.split((BLOCK_D * BLOCK_D, BLOCK_D * BLOCK_M, BLOCK_D, BLOCK_M, 16), 2)
    kk = gram.unflatten(2, (BLOCK_D, BLOCK_D))[..., :D, :D]
    if before:
        kk = kk + (before[1] - before[1].mT) / 2
    kv = linear.unflatten(2, (BLOCK_D, BLOCK_M))[..., :D, :M]
    return [x.contiguous() for x in (k_sum[..., :D], kk, v_sum[..., :M], kv)]


# Tables of boundaries.


def tables(
    starts: Tensor,
    ends: Tensor,
    sequence: Tensor,
    boundary: Tensor,
    key_mask: Tensor | None,
    n_before: Tensor | None,
    rows: int,
    chunk: int,
    is_causal: bool,
    all_scores: bool,
) -> tuple[Tensor, Tensor]:
    """`reads` and `rows_from` of every slot, int32; each holds the sums at `boundary` of `sequence`. Sequences lie at
    [starts, ends) of all batch elements' `rows`, end to end. all_scores: rows read boundary 0 only.
    """
    last = (ends - starts + chunk - 1) // chunk if is_causal else torch.ones_like(starts)
    if all_scores:
        first, enough = torch.zeros_like(starts), last + 1
    else:
        seen = torch.arange(rows + 1, device=starts.device)
        if key_mask is not None:
            seen = pad(key_mask.flatten().cumsum(0), (1, 0))
        before = seen[starts]
        first = (torch.searchsorted(seen, before, right=True) - 1 - starts) // chunk
        sixteenth = torch.searchsorted(seen, before + FEW_KEYS - 1, right=True) - 1
        enough = torch.where(sixteenth < ends, (sixteenth - starts) // chunk + 1, last + 1)
        if n_before is not None:  # a state's keys are gone: its rows read it however few they are
            enough = torch.where(n_before > 0, 0, enough)
    few = (boundary > first[sequence]) & (boundary < enough[sequence])
    resumes = torch.where(enough > last, int(NOWHERE), enough * chunk)[sequence]
    reads = torch.where(few, first[sequence], boundary)
    rows_from = torch.where(few, resumes, boundary * chunk if is_causal else 0)
    return reads.int(), rows_from.int()
