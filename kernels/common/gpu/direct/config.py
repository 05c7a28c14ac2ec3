"""Tile sizes of the direct form, by architecture, width of the inputs and head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps of a program, loads in flight."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Row:
    """One tile for each kernel. decode has few queries: its BLOCK_Q is a least size."""

    forward: Tile
    queries: Tile
    keys: Tile
    decode: Tile


HEAD_SIZES = (32, 64, 128, 256)
"""Rows of the table: the larger of BLOCK_D and BLOCK_M fits."""

SMALL = Row(forward=Tile(16, 32, 4, 2), queries=Tile(16, 32, 4, 2), keys=Tile(32, 16, 4, 2), decode=Tile(16, 32, 4, 2))

CONFIGURATIONS: dict[tuple[str, int, int], Row] = {
    ("sm_90", 2, 64): Row(
        forward=Tile(128, 128, 8, 2), queries=Tile(128, 128, 8, 2), keys=Tile(64, 128, 8, 2), decode=Tile(16, 64, 4, 3)
    ),
    ("sm_90", 2, 128): Row(
        forward=Tile(128, 128, 8, 2), queries=Tile(128, 64, 8, 2), keys=Tile(64, 128, 8, 2), decode=Tile(16, 64, 4, 3)
    ),
}


def configuration(architecture: str, dtype: torch.dtype, head_size: int) -> Row:
    if architecture == "interpreter":
        return SMALL
    size = next(size for size in HEAD_SIZES if size >= head_size)
    return CONFIGURATIONS[architecture, dtype.itemsize, size]
