"""Tile sizes of the chunked form, by architecture, width of the inputs and head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fold:
    """Rows of one step, warps of a program, loads in flight."""

    BLOCK_T: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Read:
    """Rows of a program (queries; keys for dk, dv), rows of the other side in one step, WIDTH * 16 features of one
    step, warps of a program, loads in flight.
    """

    rows: int
    others: int
    WIDTH: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Step:
    """How many numbers of a state a program holds, its warps."""

    numbers: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Row:
    chunk: int
    programs: int
    """How many programs fill the chip; sums are split into runs until there are as many."""
    pairs: Fold
    record: Fold
    read: Read
    pull_rows: Read
    pull_keys: Read
    pull_values: Read
    step: Step = Step(4096, 4)
    lost: Fold = Fold(64, 8, 2)
    """Keys of a program that looks for lost rows."""


STEP_TOKENS = 8
"""Tokens up to which a call passes over the state itself, whatever the form."""

STEP_QUERIES = 64
"""Queries of a key head up to which it does: with more, what blocks of the state give is larger than the state."""

CANCELLATION = {torch.bfloat16: 32.0, torch.float16: 32.0, torch.float32: 1024.0}
"""How many times larger than a row's sum the numbers may be that it comes from. From sums in bf16 a row then has an
error of up to 1 %, from fp32 up to 1e-4; where it would be larger its scores are computed."""

FLOPS_PER_BYTE = {"sm_80": 150, "sm_90": 184, "sm_100": 280, "gfx942": 245, "consumer": 160, "interpreter": 184}
"""Matrix products in bf16 against memory. sm_90: as measured on an H200; the others from data sheets."""

PRODUCTS = {2: 1, 4: 6}
"""Products in bf16 that take as long as one of inputs of so many bytes: three in TF32, at half the rate."""

KEPT_SHARE = 2
"""Sums that are kept for the backward pass may be so many times as large as q, k, v and out."""

HEAD_SIZES = (32, 64, 128)
"""Rows of the table: the larger of BLOCK_D and BLOCK_M fits."""

_SMALL = Read(16, 16, 16, 4, 2)
INTERPRETER = Row(
    32, 8, Fold(16, 4, 2), Fold(16, 4, 2), _SMALL, _SMALL, Read(16, 32, 8, 4, 2), Read(32, 16, 16, 4, 2), Step(1024, 4),
    Fold(32, 4, 2),
)  # fmt: skip


def _frugal(WIDTH: int, num_warps: int, rows: int = 64, step: int = 32) -> Row:
    """Meant for 99 KB of shared memory: two steps of features with their sums take 64 KB."""
    read, fold = Read(rows, rows // 2, WIDTH, num_warps, 2), Fold(step, num_warps, 2)
    return Row(512, 264, fold, fold, read, read, read, read)


CONFIGURATIONS: dict[tuple[str, int, int], Row] = {
    ("consumer", 2, 32): _frugal(16, 4),
    ("consumer", 2, 64): _frugal(16, 4),
    ("consumer", 2, 128): _frugal(8, 8),
    ("consumer", 4, 32): _frugal(16, 4),
    ("consumer", 4, 64): _frugal(4, 8, rows=32, step=16),
    ("consumer", 4, 128): _frugal(4, 8, rows=32, step=16),
    ("sm_90", 2, 32): Row(
        256, 528, Fold(64, 4, 3), Fold(64, 4, 2), Read(128, 64, 16, 4, 2), Read(128, 64, 16, 4, 2),
        Read(128, 64, 16, 4, 2), Read(128, 64, 16, 4, 2),
    ),
    ("sm_90", 2, 64): Row(
        512, 528, Fold(64, 4, 2), Fold(64, 4, 2), Read(256, 32, 16, 8, 2), Read(128, 64, 16, 8, 2),
        Read(128, 64, 16, 8, 2), Read(256, 32, 16, 8, 2),
    ),
    ("sm_90", 2, 128): Row(
        1024, 264, Fold(64, 8, 3), Fold(32, 8, 2), Read(128, 32, 8, 8, 3), Read(128, 32, 8, 8, 2),
        Read(128, 32, 8, 8, 2), Read(128, 64, 8, 8, 2),
    ),
}  # fmt: skip
"""By architecture, bytes of an input element and head size; others have the rows of "consumer". Those of sm_90 keep the
hot loops free of spills and of waits for the matrix unit, with Triton 3.6 and 3.9."""


def row(architecture: str, dtype: torch.dtype, head_size: int) -> Row:
    """The configuration of an architecture for the larger of both head sizes."""
    if architecture == "interpreter":
        return INTERPRETER
    size = next(size for size in HEAD_SIZES if size >= head_size)
    own = CONFIGURATIONS.get((architecture, dtype.itemsize, size))
    return own or CONFIGURATIONS["consumer", dtype.itemsize, size]
