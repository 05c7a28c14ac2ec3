"""A state in memory: from the canonical state to blocks and back, and the two tables of boundaries (chunk_schedule.py)
where masks, short or packed sequences make them irregular.

A state has two parts. Products, the sum of phi(x) y^T over features of degree 2, lie in 16 x 16 blocks, block
A (A + 1) / 2 + B for rows A and columns B <= A of the matrix x x^T, feature (i, j) of it at 16 i + j with i in B and j
in A: padded to BLOCK_D and BLOCK_DV. Moments are everything of degree 1 and 0 and the Gram matrix: x x^T, x y^T, x, y
and the count, with 15 zeros after it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from linattn.kernels.common.op.conditioning import DIRECT_KEYS
from linattn.kernels.quadratic.gpu.chunk_schedule import NOWHERE

if TYPE_CHECKING:
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem

State = list[Tensor]


def feature_count(BLOCK_D: int) -> int:
    """Count the features of degree 2, those of blocks on the diagonal twice."""
    return BLOCK_D * (BLOCK_D + 16) // 2


def moments_size(BLOCK_D: int, BLOCK_DV: int) -> int:
    """Count the numbers of the moments of one head."""
    return BLOCK_D * BLOCK_D + BLOCK_D * BLOCK_DV + BLOCK_D + BLOCK_DV + 16


# Products: kkv [sequences, Hkv, D (D + 1) / 2, M], the product of columns a >= b at a (a + 1) / 2 + b.


def to_blocks(kkv: Tensor, D: int, BLOCK_D: int, BLOCK_DV: int) -> Tensor:
    """Bring canonical products into blocks `[sequences, Hkv, features, BLOCK_DV]`."""
    inside, product = _product_of_feature(D, BLOCK_D, kkv.device)
    return pad(kkv.index_select(2, product) * inside[:, None], (0, BLOCK_DV - kkv.shape[3]))


def from_blocks(blocks: Tensor, D: int, M: int) -> Tensor:
    """Bring products from blocks into canonical order, the inverse of `to_blocks`."""
    return blocks.index_select(2, _feature_of_product(D, blocks.device))[..., :M]


def gradient_to_blocks(dkkv: Tensor, D: int, BLOCK_D: int, BLOCK_DV: int) -> Tensor:
    """Bring the gradient to canonical products into the form of a state over queries: twice that of a square x_a x_a,
    once that of a product x_a x_b, which stands twice in blocks of the diagonal; inter_chunk.py takes half of these.
    """
    return to_blocks(dkkv * _multiplicity(D, dkkv.device)[:, None], D, BLOCK_D, BLOCK_DV)


def gradient_from_blocks(blocks: Tensor, D: int, M: int) -> Tensor:
    """Bring a state over queries into the gradient to canonical products, the inverse of `gradient_to_blocks`."""
    return from_blocks(blocks, D, M) / _multiplicity(D, blocks.device)[:, None]


@functools.lru_cache(maxsize=32)
def _product_of_feature(D: int, BLOCK_D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    A = torch.arange(BLOCK_D // 16).repeat_interleave(256 * torch.arange(1, BLOCK_D // 16 + 1))
    in_row = torch.arange(feature_count(BLOCK_D)) - A * (A + 1) // 2 * 256
    i, j = in_row // 16, A * 16 + in_row % 16
    a, b = torch.maximum(i, j), torch.minimum(i, j)
    inside = a < D
    return inside.float().to(device), torch.where(inside, a * (a + 1) // 2 + b, 0).to(device)


@functools.lru_cache(maxsize=32)
def _feature_of_product(D: int, device: torch.device) -> Tensor:
    a, b = torch.tril_indices(D, D)
    A = a // 16
    return (A * (A + 1) // 2 * 256 + b * 16 + a % 16).to(device)


@functools.lru_cache(maxsize=32)
def _multiplicity(D: int, device: torch.device) -> Tensor:
    a, b = torch.tril_indices(D, D)
    return (1.0 + (a == b)).to(device)


# Moments.


def to_moments(sums: State, n: Tensor | None, BLOCK_D: int, BLOCK_DV: int) -> Tensor:
    """Pack k_sum, kk, v_sum, kv (and kkv, unused) as moments `[sequences, Hkv, size]`. kk enters as (kk + kk^T) / 2."""
    k_sum, kk, v_sum, kv = sums[:4]
    D, M = kv.shape[2:]
    gram = pad((kk + kk.mT) / 2, (0, BLOCK_D - D, 0, BLOCK_D - D))
    linear = pad(kv, (0, BLOCK_DV - M, 0, BLOCK_D - D))
    count = torch.zeros_like(k_sum[..., :1])
    if n is not None:
        count = count + n[:, None, None]
    parts = (gram.flatten(2), linear.flatten(2), pad(k_sum, (0, BLOCK_D - D)), pad(v_sum, (0, BLOCK_DV - M)))
    return torch.cat((*parts, pad(count, (0, 15))), 2)


def from_moments(moments: Tensor, before: State, D: int, M: int, BLOCK_D: int, BLOCK_DV: int) -> State:
    """Unpack k_sum, kk, v_sum, kv. `before`: what the moments started from, whose kk may not be symmetric."""
    gram, linear, k_sum, v_sum, _ = moments.split((BLOCK_D * BLOCK_D, BLOCK_D * BLOCK_DV, BLOCK_D, BLOCK_DV, 16), 2)
    kk = gram.unflatten(2, (BLOCK_D, BLOCK_D))[..., :D, :D]
    if before:
        kk = kk + (before[1] - before[1].mT) / 2
    kv = linear.unflatten(2, (BLOCK_D, BLOCK_DV))[..., :D, :M]
    return [x.contiguous() for x in (k_sum[..., :D], kk, v_sum[..., :M], kv)]


# Whole states.


def state_after_call(problem: ChunkedProblem, final: tuple[Tensor, Tensor] | None, before: State) -> State:
    """Return the canonical state, from products and moments after all keys and from the state they started from."""
    assert final is not None, "the state after all keys was not kept"
    T = problem.k.shape[2]
    if problem.cu_seqlens is not None:
        seen = torch.arange(T + 1, device=problem.k.device)
        if problem.key_mask is not None:
            seen = pad(problem.key_mask[0].cumsum(0), (1, 0))
        n = seen[problem.cu_seqlens.long()].diff()
    elif problem.key_mask is not None:
        n = problem.key_mask.sum(1)
    else:
        n = torch.full((problem.num_seqs,), T, dtype=torch.int64, device=problem.k.device)
    products, moments = final
    D, M = problem.q.shape[3], problem.v.shape[3]
    sums = from_moments(moments, before[1:], D, M, problem.block_d, problem.block_dv)
    return [n + before[0] if before else n, *sums, from_blocks(products, D, M)]


def gradients_to_initial_state(problem: ChunkedProblem, final: tuple[Tensor, Tensor] | None, dafter: State) -> State:
    """Return the gradients to the canonical state before the call, from products and moments before all queries; n has
    none.
    """
    assert final is not None, "the state before all queries was not kept"
    products, moments = final
    D, M = problem.q.shape[3], problem.v.shape[3]
    sums = from_moments(moments, dafter, D, M, problem.block_d, problem.block_dv)
    return [*sums, gradient_from_blocks(products, D, M)]


# Tables of boundaries.


def boundary_tables(
    starts: Tensor,
    ends: Tensor,
    sequence: Tensor,
    boundary: Tensor,
    key_mask: Tensor | None,
    n_before: Tensor | None,
    tokens: int,
    chunk: int,
    is_causal: bool,
    all_scores: bool,
) -> tuple[Tensor, Tensor]:
    """Make `state_boundary` and `first_position` of every slot, int32; each holds the state at `boundary` of
    `sequence`. Sequences lie at [starts, ends) of all batch elements' `tokens`, end to end. all_scores: queries
    multiply with the state at boundary 0 only.
    """
    last = (ends - starts + chunk - 1) // chunk if is_causal else torch.ones_like(starts)
    if all_scores:
        first, enough = torch.zeros_like(starts), last + 1
    else:
        seen = torch.arange(tokens + 1, device=starts.device)
        if key_mask is not None:
            seen = pad(key_mask.flatten().cumsum(0), (1, 0))
        before = seen[starts]
        first = (torch.searchsorted(seen, before, right=True) - 1 - starts) // chunk
        sixteenth = torch.searchsorted(seen, before + DIRECT_KEYS - 1, right=True) - 1
        enough = torch.where(sixteenth < ends, (sixteenth - starts) // chunk + 1, last + 1)
        if n_before is not None:  # a state's keys are gone: queries multiply with it however few they are
            enough = torch.where(n_before > 0, 0, enough)
    few = (boundary > first[sequence]) & (boundary < enough[sequence])
    resumes = torch.where(enough > last, int(NOWHERE), enough * chunk)[sequence]
    state_boundary = torch.where(few, first[sequence], boundary)
    first_position = torch.where(few, resumes, boundary * chunk if is_causal else 0)
    return state_boundary.int(), first_position.int()
