"""How much memory sums take: heads are processed in groups so that it stays bounded, and sums are kept for the backward
pass, or made again there, by a rule.

    LINATTN_WORKSPACE     bytes that the sums of one pass may take (default 4 GiB; at least one head is taken at a time)
    LINATTN_KEEP_SUMS     "always", "never" or, by default, "auto": the rule of `keeps_sums`
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.quadratic.gpu import config, layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from linattn.kernels.quadratic.gpu.call import Call
    from linattn.kernels.quadratic.gpu.layout import State

WORKSPACE = 4 << 30
Maybe = TypeVar("Maybe", Tensor, Tensor | None)


class Part(NamedTuple):
    """Some batch elements and key heads of a call, and the query heads that belong to them."""

    call: Call
    batch: slice
    heads: slice

    def of(self, x: Maybe) -> Maybe:
        """A view of what belongs to this part, of tensors `[B]`, `[B, T]`, `[B, heads, ...]` and states."""
        if x is None:
            return x
        x = x[self.batch]
        if x.dim() < 3:
            return x
        share = x.shape[1] // self.call.Hkv
        return x[:, self.heads.start * share : self.heads.stop * share]

    def of_all(self, tensors: State) -> State:
        return [self.of(x) for x in tensors]

    def its_call(self) -> Call:
        call = self.call
        names = ("q", "k", "v", "key_mask", "n_before")
        return replace(call, **{name: self.of(getattr(call, name)) for name in names})


def joined(results: Iterable[tuple[Part, State]]) -> State:
    """What was found for parts `[sequences]` and `[sequences, heads, ...]`, put together."""
    rows = []
    for _, of_batch in itertools.groupby(results, key=lambda result: result[0].batch.start):
        states = [state for _, state in of_batch]
        rows.append([x[0] if x[0].dim() == 1 else _cat(x, 1) for x in zip(*states, strict=True)])
    return [_cat(x, 0) for x in zip(*rows, strict=True)]


def _cat(tensors: tuple[Tensor, ...], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def parts(call: Call) -> Iterator[Part]:
    """Whole batch elements as long as one fits, then heads of one: so a part's rows lie as densely
    as the whole. The result is the same bit by bit: runs are cut by the heads of the whole call.
    """
    B, Hkv = call.k.shape[:2]
    heads = max(1, workspace() // _bytes_of_head(call))
    if heads >= B * Hkv:
        yield Part(call, slice(None), slice(0, Hkv))
    elif heads >= Hkv:
        for first in range(0, B, heads // Hkv):
            yield Part(call, slice(first, min(first + heads // Hkv, B)), slice(0, Hkv))
    else:
        for b in range(B):
            batch = slice(None) if B == 1 else slice(b, b + 1)  # a packed call has more states than batch elements
            for first in range(0, Hkv, heads):
                yield Part(call, batch, slice(first, min(first + heads, Hkv)))


def workspace() -> int:
    return int(os.environ.get("LINATTN_WORKSPACE", WORKSPACE))


def bytes_of_sums(call: Call) -> int:
    """Of the sums at all boundaries of all heads."""
    features, size = layout.features(call.BLOCK_D), layout.record_size(call.BLOCK_D, call.BLOCK_M)
    return call.slots * call.Hkv * (features * call.BLOCK_M * min(call.q.itemsize, 4) + 4 * size)


def _bytes_of_head(call: Call) -> int:
    """Sums of a key head of a batch element, and the totals of its runs in fp32: as many as chunks at most."""
    B, slots = call.k.shape[0], call.slots
    totals = min(slots // B, call.row.programs) * layout.features(call.BLOCK_D) * call.BLOCK_M * 4
    return bytes_of_sums(call) // (B * call.Hkv) + totals


def keeps_sums(call: Call) -> bool:
    """Whether the forward pass keeps its sums over keys for the gradient to queries.

    To make them again costs 2 flops a feature, value and key. To keep them costs their bytes, twice: once written to
    memory that something else could have used, once read from it. "auto" keeps them where that takes less time at the
    chip's balance of flops and bytes, and where they are at most KEPT_SHARE times as large as q, k, v and out, which
    autograd keeps anyway; and never more than the workspace.
    """
    setting, kept = os.environ.get("LINATTN_KEEP_SUMS", "auto"), bytes_of_sums(call)
    B, H, Tq, D = call.q.shape
    if setting == "never" or call.all_scores or B * call.Hkv * _bytes_of_head(call) > workspace():
        return False
    M, Tk = call.v.shape[3], call.k.shape[2]
    flops = 2 * layout.features(call.BLOCK_D) * call.BLOCK_M * B * call.Hkv * Tk
    anyway = B * (H * Tq + call.Hkv * Tk) * (D + M) * call.q.itemsize
    balance = config.FLOPS_PER_BYTE[architecture(call.q.device)] / config.PRODUCTS[call.q.itemsize]
    return setting == "always" or (2 * kept * balance < flops and kept <= config.KEPT_SHARE * anyway)
