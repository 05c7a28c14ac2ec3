"""Which sequence is this tile in? The one answer for all kernels that take packed sequences.

Packed sequences lie one after the other in a row of T tokens; sequence s has the tokens cu_seqlens[s] up to
cu_seqlens[s + 1]. Each is cut into tiles of SIZE tokens of its own. Its tiles are numbered from

    cu_seqlens[s] // SIZE + SPARE * s

on: that is never fewer numbers than the sequences before it need, and SPARE - 1 more for each of them. So every
program finds its own sequence without a table made on the host, and a grid of `max_tiles` programs is enough. A number
may lie beyond the end of its sequence: such a program has nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl


def max_tiles(tokens: int, size: int, num_seqs: int, spare: int = 1) -> int:
    """Bound the number of tiles by what the host knows: all tokens and how many sequences share them."""
    return tokens // size + spare * num_seqs


@triton.jit
def first_tile_of(sequence, cu_seqlens_ptr, SIZE, SPARE: tl.constexpr):
    """Return the number of the first tile of a sequence."""
    return (tl.load(cu_seqlens_ptr + sequence) // SIZE).to(tl.int32) + SPARE * sequence


@triton.jit
def sequence_of(tile, cu_seqlens_ptr, NUM_SEQS, SIZE, SPARE: tl.constexpr):
    """Return the sequence that a tile belongs to: the last one whose first tile is not after it."""
    low, high = 0, NUM_SEQS
    while low + 1 < high:
        middle = (low + high) // 2
        if first_tile_of(middle, cu_seqlens_ptr, SIZE, SPARE) <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def bounds_of(sequence, cu_seqlens_ptr, T, PACKED: tl.constexpr):
    """Return the first token of a sequence in its batch element, and how many tokens it has (T if not PACKED)."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
        return start, tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32) - start
    else:
        return tl.full([], 0, tl.int32), T
