"""How the kernels' tiles are described, for all tables of tile sizes.

A table is written by hand, with the reason beside its entries. There is no autotuning: an entry is chosen, never
searched, so that sums have one order and results repeat bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

BYTES_16BIT, BYTES_32BIT = 2, 4
"""Bytes of an input's element, by which tables are filed."""


@dataclass(frozen=True)
class KernelConfig:
    """The tile of one kernel and what it runs on. 0: the kernel has no such side, or it follows from the inputs."""

    BLOCK_T: int
    """Queries of a tile, or tokens of a chunk."""
    BLOCK_N: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    """Loads in flight."""
    BLOCK_D: int = 0
    """Features, where a program does not have them all."""
    BLOCK_DV: int = 0
    """Columns of values, where a program does not have them all."""

    def __str__(self) -> str:
        return f"{self.BLOCK_T}x{self.BLOCK_N} ({self.num_warps} warps, {self.num_stages} stages)"


def size_class(sizes: Iterable[int], head_size: int) -> int:
    """Return the smallest of the head sizes with an entry that is not below this one."""
    return min(size for size in sizes if size >= head_size)
