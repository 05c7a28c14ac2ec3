"""Tile sizes of the chunked form, by architecture, width of the inputs and head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StateTile:
    """Tokens of one step, warps of a program, loads in flight."""

    BLOCK_T: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ChunkTile:
    """Queries and keys of a score tile, WIDTH * 16 features in one step over a state, warps of a program, loads in
    flight. A program holds one tile of queries (output, dq) or of keys (dk, dv) and loops over the other side.
    """

    BLOCK_T: int
    BLOCK_N: int
    WIDTH: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class DecodeTile:
    """Numbers of a state in one program, warps of a program, loads in flight."""

    numbers: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class KernelConfig:
    """A chunk's length and the tile of each kernel."""

    chunk: int
    programs: int
    """How many programs fill the chip; sequences are split into runs until there are as many."""
    products: StateTile
    moments: StateTile
    output: ChunkTile
    dq: ChunkTile
    dk: ChunkTile
    dv: ChunkTile
    decode: DecodeTile = DecodeTile(4096, 4)
    cancelled: StateTile = StateTile(64, 8, 2)
    """Keys of a program that looks for cancelled queries."""

    @property
    def chunk_unit(self) -> int:
        """A chunk is a multiple of it, so that no tile of any kernel crosses a boundary."""
        return max(self.output.BLOCK_T, self.dq.BLOCK_T, self.dk.BLOCK_N, self.dv.BLOCK_N, self.cancelled.BLOCK_T)


DECODE_TOKENS = 8
"""Tokens up to which a call passes over the state itself, whatever the form."""

DECODE_QUERIES = 64
"""Queries of a key head up to which it does: with more, the partial outputs of blocks are larger than the state."""

MAX_CANCELLATION = {torch.bfloat16: 32.0, torch.float16: 32.0, torch.float32: 1024.0}
"""How many times larger than a query's sum its terms may be. From a state in bf16 the query then has an error of up to
1 %, from fp32 up to 1e-4; where it would be larger its scores are computed."""

FLOPS_PER_BYTE = {"sm_80": 150, "sm_90": 184, "sm_100": 280, "gfx942": 245, "consumer": 160, "interpreter": 184}
"""Matrix products in bf16 against memory. sm_90: as measured on an H200; the others from data sheets."""

PRODUCT_COST = {2: 1, 4: 6}
"""Products in bf16 that take as long as one of inputs of so many bytes: three in TF32, at half the rate."""

KEPT_SHARE = 2
"""States that are kept for the backward pass may be so many times as large as q, k, v and out."""

HEAD_SIZES = (32, 64, 128)
"""Head sizes of the table: the larger of BLOCK_D and BLOCK_DV fits."""

_SMALL = ChunkTile(16, 16, 16, 4, 2)
INTERPRETER = KernelConfig(
    chunk=32,
    programs=8,
    products=StateTile(16, 4, 2),
    moments=StateTile(16, 4, 2),
    output=_SMALL,
    dq=_SMALL,
    dk=ChunkTile(32, 16, 8, 4, 2),
    dv=ChunkTile(16, 32, 16, 4, 2),
    decode=DecodeTile(1024, 4),
    cancelled=StateTile(32, 4, 2),
)


def _frugal(WIDTH: int, num_warps: int, tile: int = 64, step: int = 32) -> KernelConfig:
    """Fit 99 KB of shared memory: two steps of features with their state take 64 KB."""
    own_queries, own_keys = (
        ChunkTile(queries, keys, WIDTH, num_warps, 2) for queries, keys in ((tile, tile // 2), (tile // 2, tile))
    )
    state = StateTile(step, num_warps, 2)
    return KernelConfig(512, 264, state, state, own_queries, own_queries, own_keys, own_keys)


CONFIGURATIONS: dict[tuple[str, int, int], KernelConfig] = {
    ("consumer", 2, 32): _frugal(16, 4),
    ("consumer", 2, 64): _frugal(16, 4),
    ("consumer", 2, 128): _frugal(8, 8),
    ("consumer", 4, 32): _frugal(16, 4),
    ("consumer", 4, 64): _frugal(4, 8, tile=32, step=16),
    ("consumer", 4, 128): _frugal(4, 8, tile=32, step=16),
    ("sm_90", 2, 32): KernelConfig(
        chunk=256,
        programs=528,
        products=StateTile(64, 4, 3),
        moments=StateTile(64, 4, 2),
        output=ChunkTile(128, 64, 16, 4, 2),
        dq=ChunkTile(128, 64, 16, 4, 2),
        dk=ChunkTile(64, 128, 16, 4, 2),
        dv=ChunkTile(64, 128, 16, 4, 2),
    ),
    ("sm_90", 2, 64): KernelConfig(
        chunk=512,
        programs=528,
        products=StateTile(64, 4, 2),
        moments=StateTile(64, 4, 2),
        output=ChunkTile(256, 32, 16, 8, 2),
        dq=ChunkTile(128, 64, 16, 8, 2),
        dk=ChunkTile(64, 128, 16, 8, 2),
        dv=ChunkTile(32, 256, 16, 8, 2),
    ),
    ("sm_90", 2, 128): KernelConfig(
        chunk=1024,
        programs=264,
        products=StateTile(64, 8, 3),
        moments=StateTile(32, 8, 2),
        output=ChunkTile(128, 32, 8, 8, 3),
        dq=ChunkTile(128, 32, 8, 8, 2),
        dk=ChunkTile(32, 128, 8, 8, 2),
        dv=ChunkTile(64, 128, 8, 8, 2),
    ),
}
"""By architecture, bytes of an input element and head size; others have those of "consumer". Those of sm_90 keep the
hot loops free of spills and of waits for the matrix unit, with Triton 3.6 and 3.9."""


def configuration(architecture: str, dtype: torch.dtype, head_size: int) -> KernelConfig:
    """Return the configuration of an architecture for the larger of both head sizes."""
    if architecture == "interpreter":
        return INTERPRETER
    size = next(size for size in HEAD_SIZES if size >= head_size)
    own = CONFIGURATIONS.get((architecture, dtype.itemsize, size))
    return own or CONFIGURATIONS["consumer", dtype.itemsize, size]
