"""Tile sizes of the direct form, by architecture, width of the inputs and head size.

Chosen by reading compiled code (`linattn kernels`); none was timed yet. On sm_90, in 2-byte types up to head size 128,
all products run on the asynchronous matrix unit, and nothing in the long loops serialises it or is spilled, with Triton
3.6 and 3.9. For dk and dv of head size 128, 64 queries a step instead of 32 should be a few percent faster where the
compiler finds the registers (the square on 3.6, not on 3.9): to be timed. dk and dv of head size 256 spill, and so does
fp32 from 128 on; on sm_80 that has a row without spills in the loop at 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps of a program, loads in flight."""

    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.BLOCK_Q}x{self.BLOCK_K} ({self.num_warps} warps, {self.num_stages} stages)"


@dataclass(frozen=True)
class Row:
    """The tile of each kernel: forward, dq, dk and dv, and of decoding, where BLOCK_Q is the least."""

    forward: Tile
    queries: Tile
    keys: Tile
    decode: Tile


HEAD_SIZES = (64, 128, 256)
"""A row serves head sizes, D or M, up to its own."""

LOW, FP32 = 2, 4
"""Bytes of an element."""

INTERPRETER = Row(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))

_HOPPER = {
    (LOW, 64): Row(Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(16, 64, 4, 3)),
    (LOW, 128): Row(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(16, 64, 4, 3)),
    (LOW, 256): Row(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2), Tile(16, 32, 4, 3)),
    (FP32, 64): Row(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(16, 64, 4, 3)),
    (FP32, 128): Row(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 3)),
    (FP32, 256): Row(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 4, 3)),
}
_AMPERE = {
    (LOW, 64): Row(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 3)),
    (LOW, 128): Row(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(16, 64, 4, 3)),
    (LOW, 256): Row(Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1), Tile(16, 32, 4, 2)),
    (FP32, 64): Row(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 64, 4, 2)),
    (FP32, 128): Row(Tile(32, 32, 4, 2), Tile(32, 16, 8, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)),
    (FP32, 256): Row(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 4, 2)),
}
_CONSUMER = {
    (LOW, 64): Row(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(16, 64, 4, 2)),
    (LOW, 128): Row(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(16, 32, 4, 2)),
    (LOW, 256): Row(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(16, 32, 4, 2)),
    (FP32, 64): Row(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)),
    (FP32, 128): Row(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    (FP32, 256): Row(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
CONFIGURATIONS = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": _CONSUMER,  # 64 KB of shared memory, no loads in flight beyond registers
    "consumer": _CONSUMER,
    "interpreter": {(width, size): INTERPRETER for width in (LOW, FP32) for size in HEAD_SIZES},
}

# Programs that fill a chip, two for each multiprocessor of its largest model: decoding splits keys alike on all.
PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608, "consumer": 256, "interpreter": 8}
MOST_SPLITS = 64
"""Their sums are added up in one program's registers."""


def configuration(architecture: str, dtype: torch.dtype, head_size: int) -> Row:
    size = next(size for size in HEAD_SIZES if head_size <= size)
    return CONFIGURATIONS[architecture][dtype.itemsize, size]
