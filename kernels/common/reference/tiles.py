"""Tiles of queries, keys and scores: how they are cut, loaded and masked. Shared by every reference path."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from linattn.kernels.common.op.allocation import accumulation_dtype, empty_in_storage_order
from linattn.kernels.common.op.varlen import sequence_bounds

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE_ELEMENTS = 1 << 18  # scores held at once: 1 MiB in fp32, which stays in a core's cache
SHORTEST_TILE = 128  # below this the calls cost more than the arithmetic

AnyTiles = TypeVar("AnyTiles", bound="Tiles")


@dataclass(frozen=True)
class Tiles:
    """q `[B, Hq, Tq, D]`, k `[B, Hkv, Tk, D]`, v `[B, Hkv, Tk, M]` of any strides.

    Tiles are `[B*Hkv, rows, size]` in the accumulation dtype. The G = Hq/Hkv query heads that share a key head are
    folded into the rows, so that grouped queries need no copy of the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    is_causal: bool
    q_offset: int
    scale: float
    key_positions: Tensor | None = None  # [B, Tk], when keys do not lie at 0, 1, ..., Tk - 1

    @property
    def batch(self) -> int:
        """Batch elements times key heads."""
        return self.k.shape[0] * self.k.shape[1]

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def Tq(self) -> int:  # noqa: N802 (the formula's letter)
        """Number of queries."""
        return self.q.shape[2]

    @property
    def Tk(self) -> int:  # noqa: N802 (the formula's letter)
        """Number of keys."""
        return self.k.shape[2]

    @property
    def D(self) -> int:  # noqa: N802 (the formula's letter)
        """Head size of queries and keys."""
        return self.q.shape[3]

    @property
    def M(self) -> int:  # noqa: N802 (the formula's letter)
        """Head size of values."""
        return self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype."""
        return accumulation_dtype(self.q.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Make zeros in the accumulation dtype."""
        return torch.zeros(shape, dtype=self.dtype, device=self.q.device)

    def no_sums(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of p v and the sum of p of rows x that have seen nothing yet."""
        return self.zeros(*x.shape[:2], self.M), self.zeros(*x.shape[:2])

    # Cutting.

    def tile_length(self) -> int:
        """The largest power of two in [SHORTEST_TILE, 1024] whose square tiles, over all heads, fit TILE_ELEMENTS."""
        length = 1024
        while length > SHORTEST_TILE and self.batch * self.groups * length * length > TILE_ELEMENTS:
            length //= 2
        return length

    def visible_keys(self, i1: int) -> int:
        """How many leading keys the rows before i1 can see at most."""
        if not self.is_causal or self.key_positions is not None:
            return self.Tk
        return min(max(i1 + self.q_offset, 0), self.Tk)

    # Loading. `x` stands for the scaled query, so that s = x.k and the coefficients stay what the caller gave.

    def fold(self, rows: Tensor) -> Tensor:
        """`[B, Hq, r, ...]` -> `[B*Hkv, G*r, ...]` in the accumulation dtype."""
        B, Hkv = self.k.shape[:2]
        return rows.to(self.dtype).reshape(B * Hkv, self.groups * rows.shape[2], *rows.shape[3:])

    def unfold(self, tile: Tensor) -> Tensor:
        """`[B*Hkv, G*r, ...]` -> `[B, Hq, r, ...]`."""
        B, Hq = self.q.shape[:2]
        return tile.reshape(B, Hq, -1, *tile.shape[2:])

    def queries(self, i0: int, i1: int) -> Tensor:
        """Load scaled queries i0..i1."""
        return self.fold(self.q[:, :, i0:i1]) * self.scale

    def keys(self, j0: int, j1: int) -> Tensor:
        """Load keys j0..j1, masked ones zero."""
        return self._load(self.k, j0, j1)

    def values(self, j0: int, j1: int) -> Tensor:
        """Load values j0..j1, masked ones zero."""
        return self._load(self.v, j0, j1)

    def _load(self, source: Tensor, j0: int, j1: int) -> Tensor:
        rows = source[:, :, j0:j1].to(self.dtype).reshape(self.batch, j1 - j0, source.shape[3])
        return self.kept(rows, j0, j1)

    def kept(self, rows: Tensor, j0: int, j1: int) -> Tensor:
        """Key rows `[B*Hkv, j1 - j0, size]` with masked ones zero. Filled, not multiplied: padding may hold NaN."""
        if self.key_mask is None:
            return rows
        masked = ~self.key_mask[:, None, j0:j1, None]
        return rows.unflatten(0, self.k.shape[:2]).masked_fill(masked, 0).flatten(0, 1)

    def count(self, j0: int, j1: int) -> Tensor:
        """How many keys of the tile count, `[B]`."""
        if self.key_mask is None:
            return torch.full((self.k.shape[0],), j1 - j0, dtype=torch.int64, device=self.k.device)
        return self.key_mask[:, j0:j1].sum(-1)

    # Scores.

    def hidden(self, i0: int, i1: int, j0: int, j1: int) -> Tensor | None:
        """Which scores of a tile do not count, broadcastable to `[B, Hkv, G, r, c]`, or None if all do."""
        hidden = None
        if self.is_causal and (self.key_positions is not None or j1 - 1 > i0 + self.q_offset):
            rows = torch.arange(i0 + self.q_offset, i1 + self.q_offset, device=self.q.device)
            if self.key_positions is None:
                hidden = rows[:, None] < torch.arange(j0, j1, device=self.q.device)
            else:
                hidden = (rows[:, None] < self.key_positions[:, None, j0:j1])[:, None, None]
        if self.key_mask is not None:
            masked = ~self.key_mask[:, None, None, None, j0:j1]
            hidden = masked if hidden is None else hidden | masked
        return hidden

    def hide(self, tile: Tensor, hidden: Tensor | None, value: float = 0) -> Tensor:
        """Overwrite the hidden entries of a tile `[B*Hkv, G*r, c]` in place."""
        if hidden is not None:
            B, Hkv = self.k.shape[:2]
            tile.view(B, Hkv, self.groups, -1, tile.shape[-1]).masked_fill_(hidden, value)
        return tile


class TileGradients(NamedTuple):
    """Hold what a backward pass fills, in the accumulation dtype.

    dq `[B*Hkv, G, Tq, D]`, dk `[B*Hkv, Tk, D]`, dv `[B*Hkv, Tk, M]`.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor

    @staticmethod
    def zeros(tiles: Tiles) -> TileGradients:
        """Begin with zeros."""
        dq = tiles.zeros(tiles.batch, tiles.groups, tiles.Tq, tiles.D)
        return TileGradients(
            dq, tiles.zeros(tiles.batch, tiles.Tk, tiles.D), tiles.zeros(tiles.batch, tiles.Tk, tiles.M)
        )

    def add_query(self, i0: int, i1: int, dx: Tensor, scale: float) -> None:
        """Add the gradient to scaled query rows `[B*Hkv, G*r, D]`."""
        self.dq[:, :, i0:i1] += (dx * scale).unflatten(1, (self.dq.shape[1], -1))

    def add_key(self, j0: int, j1: int, dk: Tensor, dv: Tensor) -> None:
        """Add the gradients to keys and values j0..j1."""
        self.dk[:, j0:j1] += dk
        self.dv[:, j0:j1] += dv


class InputGradients(NamedTuple):
    """The gradients in the layout and dtype of the inputs."""

    dq: Tensor
    dk: Tensor
    dv: Tensor

    @staticmethod
    def empty(tiles: Tiles) -> InputGradients:
        """Allocate without filling."""
        return InputGradients(*(empty_in_storage_order(x, x.shape[3]) for x in (tiles.q, tiles.k, tiles.v)))

    def store(self, rows: slice, gradients: TileGradients) -> None:
        """Write the gradients of one sequence."""
        for whole, part in zip(self, gradients, strict=True):
            target = whole[:, :, rows]
            target.copy_(part.view(target.shape))


def sequences(tiles: AnyTiles, cu_seqlens: Tensor | None) -> list[tuple[AnyTiles, slice, int | None]]:
    """The problems of which a call consists, the rows of each, and its index among packed sequences."""
    if cu_seqlens is None:
        return [(tiles, slice(None), None)]
    parts: list[tuple[AnyTiles, slice, int | None]] = []
    for i, (start, end) in enumerate(sequence_bounds(cu_seqlens, tiles.Tk)):
        rows = slice(start, end)
        mask = None if tiles.key_mask is None else tiles.key_mask[:, rows]
        q, k, v = (x[:, :, rows] for x in (tiles.q, tiles.k, tiles.v))
        parts.append((dataclasses.replace(tiles, q=q, k=k, v=v, key_mask=mask), rows, i))
    return parts


def spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) into pieces of at most `length`."""
    for i in range(start, stop, length):
        yield i, min(i + length, stop)


def divided(x: Tensor, l: Tensor) -> Tensor:
    """X / l by rows, and 0 where l <= 0: such a row saw no key, or lost its sum to cancellation. NaN stays NaN."""
    return x / l.masked_fill(l <= 0, math.inf)[..., None]
