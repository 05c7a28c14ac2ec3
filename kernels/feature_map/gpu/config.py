"""Tile sizes by architecture, size of the operands and head size. No autotuning: a row is chosen, never searched."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Config:
    """How the kernels of one call are cut."""

    chunk: int
    """Keys between two stored sums in the forward pass, and rows of a program there."""
    backward_chunk: int
    features: int
    """Features whose sums one program keeps."""
    columns: int
    """Columns of the output a program makes."""
    gradient: int
    """Columns of dq, dk and dv a program makes."""
    keys: int
    """Keys multiplied at once inside a chunk in the forward pass."""
    state_warps: int
    output_warps: int
    gradient_warps: int
    stages: int
    """Of the scan of keys: chunks in flight."""
    row_stages: int
    """Of the scan of rows, which reads one operand more."""
    fill: int = 256
    """Programs of a scan below which sequences are split."""


SHORTEST_SPLIT = 4  # chunks
MOST_SPLITS = 16
DECODED = 8
"""Tokens up to which a call with a state is walked token by token, whatever the form."""

SIZES = (32, 64, 128, 256)
"""Rows are for head sizes up to these: max(D, M)."""

# fmt: off
_LOW = {
    32: Config(
        chunk=128, backward_chunk=64, features=32, columns=32, gradient=32, keys=128,
        state_warps=4, output_warps=4, gradient_warps=4, stages=3, row_stages=3,
    ),
    # With 4 warps Triton 3.6 puts the products of the gradients one after the other.
    64: Config(
        chunk=128, backward_chunk=64, features=64, columns=64, gradient=64, keys=64,
        state_warps=4, output_warps=8, gradient_warps=8, stages=2, row_stages=2,
    ),
    128: Config(
        chunk=128, backward_chunk=64, features=64, columns=128, gradient=128, keys=64,
        state_warps=8, output_warps=8, gradient_warps=8, stages=2, row_stages=2,
    ),
    256: Config(
        chunk=64, backward_chunk=64, features=64, columns=128, gradient=64, keys=64,
        state_warps=8, output_warps=8, gradient_warps=8, stages=2, row_stages=1,
    ),
}
_WIDE = {
    32: Config(
        chunk=64, backward_chunk=32, features=32, columns=32, gradient=32, keys=64,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    64: Config(
        chunk=64, backward_chunk=32, features=64, columns=64, gradient=32, keys=64,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    128: Config(
        chunk=64, backward_chunk=32, features=64, columns=64, gradient=32, keys=32,
        state_warps=4, output_warps=8, gradient_warps=4, stages=2, row_stages=2,
    ),
    256: Config(
        chunk=16, backward_chunk=32, features=64, columns=32, gradient=32, keys=16,
        state_warps=8, output_warps=4, gradient_warps=4, stages=2, row_stages=1,
    ),
}
# Also for sm_80, which multiplies from registers too: the larger tiles spill there.
_CONSUMER_LOW = {
    32: Config(
        chunk=64, backward_chunk=64, features=32, columns=32, gradient=32, keys=64,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    64: Config(
        chunk=64, backward_chunk=32, features=64, columns=64, gradient=64, keys=64,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    128: Config(
        chunk=64, backward_chunk=32, features=64, columns=64, gradient=64, keys=64,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    256: Config(
        chunk=32, backward_chunk=32, features=64, columns=64, gradient=64, keys=32,
        state_warps=8, output_warps=4, gradient_warps=4, stages=2, row_stages=1,
    ),
}
_CONSUMER_WIDE = {
    32: Config(
        chunk=64, backward_chunk=32, features=32, columns=32, gradient=32, keys=32,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    64: Config(
        chunk=32, backward_chunk=32, features=64, columns=64, gradient=32, keys=32,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    128: Config(
        chunk=32, backward_chunk=16, features=32, columns=32, gradient=32, keys=32,
        state_warps=4, output_warps=4, gradient_warps=4, stages=2, row_stages=2,
    ),
    256: Config(
        chunk=16, backward_chunk=16, features=32, columns=32, gradient=32, keys=16,
        state_warps=8, output_warps=4, gradient_warps=4, stages=1, row_stages=1,
    ),
}
# Triton 3.9 cannot pipeline the scan in bf16 for sm_100: its compiler fails.
_UNPIPELINED_LOW = {size: replace(row, stages=1, row_stages=1) for size, row in _LOW.items()}
_SMALL = {
    size: Config(
        chunk=16, backward_chunk=16, features=16, columns=16, gradient=16, keys=16,
        state_warps=4, output_warps=4, gradient_warps=4, stages=1, row_stages=1, fill=16,
    )
    for size in SIZES
}
# fmt: on

# By architecture and whether products are of 4-byte numbers (fp32, and fp16 in TF32).
TABLE: dict[tuple[str, bool], dict[int, Config]] = {
    ("sm_80", False): _CONSUMER_LOW,
    ("sm_80", True): _CONSUMER_WIDE,
    ("sm_90", False): _LOW,
    ("sm_90", True): _WIDE,
    ("sm_100", False): _UNPIPELINED_LOW,
    ("sm_100", True): _WIDE,
    ("gfx942", False): _CONSUMER_LOW,
    ("gfx942", True): _CONSUMER_WIDE,
    ("consumer", False): _CONSUMER_LOW,
    ("consumer", True): _CONSUMER_WIDE,
    ("interpreter", False): _SMALL,
    ("interpreter", True): _SMALL,
}


def configuration(architecture: str, dtype: torch.dtype, D: int, M: int) -> Config:
    size = next(size for size in SIZES if max(D, M) <= size)
    return TABLE[architecture, dtype != torch.bfloat16][size]


def splits_for(config: Config, programs: int, chunks: int) -> int:
    """Into how many parts sequences are scanned at once, a power of two: enough to fill the chip, none too short."""
    splits = 1
    while splits < MOST_SPLITS and programs * splits < config.fill and chunks >= 2 * splits * SHORTEST_SPLIT:
        splits *= 2
    return splits
