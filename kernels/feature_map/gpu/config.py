"""Tile sizes by architecture, bytes of a product's factor and head size.

None was timed yet: chosen by reading compiled code (`linattn kernels`), so that the hot loops spill nothing where they
can, with Triton 3.6 and 3.9.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from linattn.kernels.common.gpu.config import BYTES_16BIT, BYTES_32BIT, KernelConfig, size_class


@dataclass(frozen=True)
class FeatureMapConfig:
    """The tiles of one call's kernels. BLOCK_T is the length of a chunk, in the forward and in the backward pass."""

    output: KernelConfig
    """BLOCK_N: keys multiplied at once inside a chunk. BLOCK_DV: columns of the output that a program makes."""
    backward: KernelConfig
    """BLOCK_D: columns of dq, dk and dv that a program makes."""
    state: KernelConfig
    """Tile of the scan over keys. BLOCK_D: features whose sums a program keeps. Its chunk: that of the pass served."""
    state_gradient: KernelConfig
    """Tile of the scan over queries, which loads one operand more."""
    programs: int = 256
    """Programs of a scan below which sequences are split."""


SHORTEST_SPLIT = 4  # chunks
MOST_SPLITS = 16
FEW_TOKENS = 8
"""Tokens up to which a call with a state goes token by token, whatever the form."""

HEAD_SIZES = (32, 64, 128, 256)
"""Entries are for head sizes up to these: max(D, M)."""


def _tiles(
    output: tuple[int, int, int, int], backward: tuple[int, int, int], state: tuple[int, int, int, int]
) -> FeatureMapConfig:
    """Build an entry. output: chunk, keys, columns, warps. backward: chunk, columns, warps. state: features, warps,
    stages over keys, stages over queries.
    """
    chunk, keys, values, output_warps = output
    backward_chunk, columns, backward_warps = backward
    features, state_warps, key_stages, query_stages = state
    return FeatureMapConfig(
        output=KernelConfig(chunk, keys, output_warps, 1, BLOCK_DV=values),
        backward=KernelConfig(backward_chunk, backward_chunk, backward_warps, 1, BLOCK_D=columns),
        state=KernelConfig(0, 0, state_warps, key_stages, BLOCK_D=features),
        state_gradient=KernelConfig(0, 0, state_warps, query_stages, BLOCK_D=features),
    )


# sm_90, 16-bit factors. Backward at 64: with 4 warps Triton 3.6 puts its products one after the other.
_HOPPER_16BIT = {
    32: _tiles(output=(128, 128, 32, 4), backward=(64, 32, 4), state=(32, 4, 3, 3)),
    64: _tiles(output=(128, 64, 64, 8), backward=(64, 64, 8), state=(64, 4, 2, 2)),
    128: _tiles(output=(128, 64, 128, 8), backward=(64, 128, 8), state=(64, 8, 2, 2)),
    256: _tiles(output=(64, 64, 128, 8), backward=(64, 64, 8), state=(64, 8, 2, 1)),
}
# sm_90, factors of 4 bytes: each is split in two for TF32, so tiles are half as long.
_HOPPER_32BIT = {
    32: _tiles(output=(64, 64, 32, 4), backward=(32, 32, 4), state=(32, 4, 2, 2)),
    64: _tiles(output=(64, 64, 64, 4), backward=(32, 32, 4), state=(64, 4, 2, 2)),
    128: _tiles(output=(64, 32, 64, 8), backward=(32, 32, 4), state=(64, 4, 2, 2)),
    256: _tiles(output=(16, 16, 32, 4), backward=(32, 32, 4), state=(64, 8, 2, 1)),
}
# 99 KB of shared memory. Also for sm_80, whose products take both factors from registers: larger tiles spill there.
_CONSUMER_16BIT = {
    32: _tiles(output=(64, 64, 32, 4), backward=(64, 32, 4), state=(32, 4, 2, 2)),
    64: _tiles(output=(64, 64, 64, 4), backward=(32, 64, 4), state=(64, 4, 2, 2)),
    128: _tiles(output=(64, 64, 64, 4), backward=(32, 64, 4), state=(64, 4, 2, 2)),
    256: _tiles(output=(32, 32, 64, 4), backward=(32, 64, 4), state=(64, 8, 2, 1)),
}
_CONSUMER_32BIT = {
    32: _tiles(output=(64, 32, 32, 4), backward=(32, 32, 4), state=(32, 4, 2, 2)),
    64: _tiles(output=(32, 32, 64, 4), backward=(32, 32, 4), state=(64, 4, 2, 2)),
    128: _tiles(output=(32, 32, 32, 4), backward=(16, 32, 4), state=(32, 4, 2, 2)),
    256: _tiles(output=(16, 16, 32, 4), backward=(16, 32, 4), state=(32, 8, 1, 1)),
}
# Triton 3.9 cannot pipeline the scan in bf16 for sm_100: its compiler fails.
_BLACKWELL_16BIT = {
    size: replace(
        config, state=replace(config.state, num_stages=1), state_gradient=replace(config.state_gradient, num_stages=1)
    )
    for size, config in _HOPPER_16BIT.items()
}
# Small tiles, so that short sequences cross several, and sequences are split early.
_INTERPRETER = dict.fromkeys(
    HEAD_SIZES,
    replace(_tiles(output=(16, 16, 16, 4), backward=(16, 16, 4), state=(16, 4, 1, 1)), programs=16),
)

# By architecture and bytes of a product's factor: 4 for fp32, and for fp16, which is multiplied as TF32.
CONFIGURATIONS: dict[tuple[str, int], dict[int, FeatureMapConfig]] = {
    ("sm_80", BYTES_16BIT): _CONSUMER_16BIT,
    ("sm_80", BYTES_32BIT): _CONSUMER_32BIT,
    ("sm_90", BYTES_16BIT): _HOPPER_16BIT,
    ("sm_90", BYTES_32BIT): _HOPPER_32BIT,
    ("sm_100", BYTES_16BIT): _BLACKWELL_16BIT,
    ("sm_100", BYTES_32BIT): _HOPPER_32BIT,
    ("gfx942", BYTES_16BIT): _CONSUMER_16BIT,
    ("gfx942", BYTES_32BIT): _CONSUMER_32BIT,
    ("consumer", BYTES_16BIT): _CONSUMER_16BIT,
    ("consumer", BYTES_32BIT): _CONSUMER_32BIT,
    ("interpreter", BYTES_16BIT): _INTERPRETER,
    ("interpreter", BYTES_32BIT): _INTERPRETER,
}


def configuration(architecture: str, dtype: torch.dtype, D: int, M: int) -> FeatureMapConfig:
    """Return the tiles for an architecture, the dtype of the inputs and both head sizes."""
    width = BYTES_16BIT if dtype == torch.bfloat16 else BYTES_32BIT
    return CONFIGURATIONS[architecture, width][size_class(HEAD_SIZES, max(D, M))]


def splits_for(config: FeatureMapConfig, programs: int, chunks: int) -> int:
    """Return into how many parts sequences are scanned at once, a power of two: enough to fill the chip, none too
    short.
    """
    splits = 1
    while splits < MOST_SPLITS and programs * splits < config.programs and chunks >= 2 * splits * SHORTEST_SPLIT:
        splits *= 2
    return splits
