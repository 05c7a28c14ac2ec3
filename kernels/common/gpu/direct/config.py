"""Tile sizes of the direct form, by architecture, bytes of an input's element and head size.

Chosen by reading compiled code (`linattn kernels`); none was timed yet. On sm_90, in 2-byte types up to head size 128,
all products run on the asynchronous matrix unit, and nothing in the long loops serialises it or is spilled, with Triton
3.6 and 3.9. For dk and dv of head size 128, 64 queries a step instead of 32 should be a few percent faster where the
compiler finds the registers (the square on 3.6, not on 3.9): to be timed. dk and dv of head size 256 spill, and so does
fp32 from 128 on; on sm_80 that has an entry without spills in the loop at 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linattn.kernels.common.gpu.config import BYTES_16BIT, BYTES_32BIT, KernelConfig, size_class

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DirectConfig:
    """The tiles of one call: forward, dq, dk and dv, and of decoding, where BLOCK_T is the least."""

    forward: KernelConfig
    dq: KernelConfig
    dkv: KernelConfig
    decode: KernelConfig


HEAD_SIZES = (64, 128, 256)
"""An entry serves head sizes, D or M, up to its own."""


def _tiles(*kernels: tuple[int, int, int, int]) -> DirectConfig:
    """Build an entry from BLOCK_T, BLOCK_N, warps and stages of forward, dq, dkv and decode."""
    return DirectConfig(*(KernelConfig(*kernel) for kernel in kernels))


INTERPRETER = _tiles((16, 32, 4, 2), (16, 32, 4, 2), (32, 16, 4, 2), (16, 32, 4, 2))

# sm_90. 128 queries give each of two groups of four warps the 64 that its matrix instruction takes.
_HOPPER = {
    # 206 to 235 registers, nothing spilled.
    (BYTES_16BIT, 64): _tiles((128, 128, 8, 2), (128, 128, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3)),
    # 213 to 255 registers; dq holds an operand more than forward, dk and dv a sum too: shorter steps.
    (BYTES_16BIT, 128): _tiles((128, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2), (16, 64, 4, 3)),
    # dk and dv spill.
    (BYTES_16BIT, 256): _tiles((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (16, 32, 4, 3)),
    # Forward spills nothing.
    (BYTES_32BIT, 64): _tiles((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (16, 64, 4, 3)),
    # Spills: of the tiles that were tried those that spill less lose more (docs/gpu-kernels.md).
    (BYTES_32BIT, 128): _tiles((64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2), (16, 32, 4, 3)),
    # Spills; dk and dv most.
    (BYTES_32BIT, 256): _tiles((16, 32, 8, 1), (16, 16, 8, 1), (32, 32, 8, 1), (16, 16, 4, 3)),
}
# sm_80. Products take both factors from registers, so tiles are smaller.
_AMPERE = {
    # 242 to 255 registers, at most 4 bytes spilled; two programs fit.
    (BYTES_16BIT, 64): _tiles((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (16, 64, 4, 3)),
    (BYTES_16BIT, 128): _tiles((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (16, 64, 4, 3)),
    (BYTES_16BIT, 256): _tiles((64, 64, 8, 1), (64, 32, 8, 1), (32, 64, 8, 1), (16, 32, 4, 2)),
    (BYTES_32BIT, 64): _tiles((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2)),
    # Spills nothing in the loop of the quadratic kernels.
    (BYTES_32BIT, 128): _tiles((32, 32, 4, 2), (32, 16, 8, 2), (32, 16, 4, 2), (16, 32, 4, 2)),
    # Up to 100 bytes spilled forward and 204 for dq, where 32 queries and more spilled kilobytes; dk and dv still do.
    (BYTES_32BIT, 256): _tiles((16, 32, 8, 1), (16, 16, 8, 1), (16, 32, 8, 1), (16, 16, 4, 2)),
}
# sm_86, sm_89, sm_120 and gfx942: 99 KB or 64 KB of shared memory a program, so tiles are small.
_CONSUMER = {
    (BYTES_16BIT, 64): _tiles((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (16, 64, 4, 2)),
    (BYTES_16BIT, 128): _tiles((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (16, 32, 4, 2)),
    (BYTES_16BIT, 256): _tiles((32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 4, 2)),
    (BYTES_32BIT, 64): _tiles((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (BYTES_32BIT, 128): _tiles((32, 32, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    (BYTES_32BIT, 256): _tiles((16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}
CONFIGURATIONS = {
    "sm_80": _AMPERE,
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": _CONSUMER,  # 64 KB of shared memory, no loads in flight beyond registers
    "consumer": _CONSUMER,
    "interpreter": {(width, size): INTERPRETER for width in (BYTES_16BIT, BYTES_32BIT) for size in HEAD_SIZES},
}

# Programs that fill a chip, two for each multiprocessor of its largest model: decoding splits keys alike on all.
PROGRAMS = {"sm_80": 216, "sm_90": 264, "sm_100": 296, "gfx942": 608, "consumer": 256, "interpreter": 8}
MOST_SPLITS = 64
"""Their sums are added up in one program's registers."""


def configuration(architecture: str, dtype: torch.dtype, head_size: int) -> DirectConfig:
    """Return the tiles for an architecture and the larger of both head sizes."""
    return CONFIGURATIONS[architecture][dtype.itemsize, size_class(HEAD_SIZES, head_size)]
