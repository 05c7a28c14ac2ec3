"""How much memory states take: heads are processed in groups so that it stays bounded, and states are kept for the
backward pass, or made again there, by a rule.

    LINATTN_WORKSPACE     bytes that the states of one pass may take (default 4 GiB; one head is always taken)
    LINATTN_KEEP_SUMS     "always", "never" or, by default, "auto": the rule of `keeps_states`
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.quadratic.gpu import config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem
    from linattn.kernels.quadratic.gpu.state_layout import State

WORKSPACE = 4 << 30
Maybe = TypeVar("Maybe", Tensor, Tensor | None)


class HeadGroup(NamedTuple):
    """Some batch elements and key heads of a call, and the query heads that belong to them."""

    whole: ChunkedProblem
    batch: slice
    heads: slice

    def of(self, x: Maybe) -> Maybe:
        """Return a view of what belongs to this group, of tensors `[B]`, `[B, T]`, `[B, heads, ...]` and states."""
        if x is None:
            return x
        x = x[self.batch]
        if x.dim() < 3:
            return x
        share = x.shape[1] // self.whole.kv_heads
        return x[:, self.heads.start * share : self.heads.stop * share]

    def of_all(self, tensors: State) -> State:
        """Return a view of what belongs to this group, of each tensor."""
        return [self.of(x) for x in tensors]

    def problem(self) -> ChunkedProblem:
        """Return the call on this group alone."""
        whole = self.whole
        names = ("q", "k", "v", "key_mask", "n_before")
        return replace(whole, **{name: self.of(getattr(whole, name)) for name in names})


def concat_states(results: Iterable[tuple[HeadGroup, State]]) -> State:
    """Put together the states of groups `[sequences]` and `[sequences, heads, ...]`."""
    whole_batches = []
    for _, of_batch in itertools.groupby(results, key=lambda result: result[0].batch.start):
        states = [state for _, state in of_batch]
        whole_batches.append([x[0] if x[0].dim() == 1 else _cat(x, 1) for x in zip(*states, strict=True)])
    return [_cat(x, 0) for x in zip(*whole_batches, strict=True)]


def _cat(tensors: tuple[Tensor, ...], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def head_groups(problem: ChunkedProblem) -> Iterator[HeadGroup]:
    """Cut a call into whole batch elements as long as one fits, then heads of one: so the tokens of a group lie as
    densely as in the whole. The result is the same bit by bit: runs are cut by the heads of the whole call.
    """
    B, Hkv = problem.k.shape[:2]
    heads = max(1, workspace() // _bytes_of_head(problem))
    if heads >= B * Hkv:
        yield HeadGroup(problem, slice(None), slice(0, Hkv))
    elif heads >= Hkv:
        for first in range(0, B, heads // Hkv):
            yield HeadGroup(problem, slice(first, min(first + heads // Hkv, B)), slice(0, Hkv))
    else:
        for b in range(B):
            batch = slice(None) if B == 1 else slice(b, b + 1)  # a packed call has more states than batch elements
            for first in range(0, Hkv, heads):
                yield HeadGroup(problem, batch, slice(first, min(first + heads, Hkv)))


def workspace() -> int:
    """Return the bytes that states may take."""
    return int(os.environ.get("LINATTN_WORKSPACE", WORKSPACE))


def bytes_of_states(problem: ChunkedProblem) -> int:
    """Count the bytes of the states at all boundaries of all heads."""
    products = problem.feature_count * problem.block_dv * min(problem.q.itemsize, 4)
    return problem.slots * problem.kv_heads * (products + 4 * problem.moments_size)


def _bytes_of_head(problem: ChunkedProblem) -> int:
    """Count the bytes of the states of a key head of a batch element, and of the totals of its runs in fp32: as many as
    chunks at most.
    """
    B = problem.k.shape[0]
    runs = min(problem.slots // B, problem.tiles.programs)
    totals = runs * problem.feature_count * problem.block_dv * 4
    return bytes_of_states(problem) // (B * problem.kv_heads) + totals


def keeps_states(problem: ChunkedProblem) -> bool:
    """Return whether the forward pass keeps its states over keys for the gradient to queries.

    To make them again costs 2 flops a feature, value and key. To keep them costs their bytes, twice: once written to
    memory that something else could have used, once loaded from it. "auto" keeps them where that takes less time at the
    chip's balance of flops and bytes, and where they are at most KEPT_SHARE times as large as q, k, v and out, which
    autograd keeps anyway; and never more than the workspace.
    """
    setting, kept = os.environ.get("LINATTN_KEEP_SUMS", "auto"), bytes_of_states(problem)
    B, H, Tq, D = problem.q.shape
    too_large = B * problem.kv_heads * _bytes_of_head(problem) > workspace()
    if setting == "never" or problem.all_scores or too_large:
        return False
    M, Tk = problem.v.shape[3], problem.k.shape[2]
    flops = 2 * problem.feature_count * problem.block_dv * B * problem.kv_heads * Tk
    anyway = B * (H * Tq + problem.kv_heads * Tk) * (D + M) * problem.q.itemsize
    balance = config.FLOPS_PER_BYTE[architecture(problem.q.device)] / config.PRODUCT_COST[problem.q.itemsize]
    return setting == "always" or (2 * kept * balance < flops and kept <= config.KEPT_SHARE * anyway)
