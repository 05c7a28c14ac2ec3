"""Which queries, keys and states a program works on.

Keys 0, CHUNK, 2 CHUNK, ... of a sequence begin a chunk. Query i stands at position p = i + q_offset and sees keys <= p,
so queries are cut at the same positions: tile r holds the queries at positions [r CHUNK, (r + 1) CHUNK). It multiplies
the state after the chunks before r and the scores within chunk r. Tiles below 0 see no key of this call, tiles past the
last chunk see all of them. Not causal, offsets are 0 and every query sees all.

Packed sequences are found as everywhere (common/gpu/varlen_schedule.py). With an offset, queries take other chunks than
keys, so each tile number stands for TILES_PER_NUMBER = 2 tiles instead of 1: enough for both, and still no collision.
Tiles that no sequence takes stay idle.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.varlen_schedule import bounds_of, first_tile_of, sequence_of


@triton.jit
def clamp_offset(q_offset, Tq, Tk, IS_CAUSAL: tl.constexpr):
    """Clamp an offset: beyond the ends of the keys all are alike."""
    if IS_CAUSAL:
        return tl.minimum(tl.maximum(q_offset, -Tq), Tk)
    else:
        return tl.full([], 0, tl.int32)


@triton.jit
def tile_of_first_query(offset, CHUNK: tl.constexpr):
    """Return the tile of query 0."""
    return tl.where(offset >= 0, offset // CHUNK, -((CHUNK - 1 - offset) // CHUNK))


@triton.jit
def locate_chunk(
    tile,
    b,
    cu_seqlens_ptr,
    NUM_SEQS,
    Tq,
    Tk,
    q_offset,
    TILES_PER_NUMBER,
    CHUNK: tl.constexpr,
    PACKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    FROM_KEYS: tl.constexpr,
):
    """Locate tile `tile` of batch element b: its sequence, its number r in it, where that starts, how many queries and
    keys it has, and its offset. FROM_KEYS: tiles of keys count, also those before the first query.
    """
    s = sequence_of(tile // TILES_PER_NUMBER, cu_seqlens_ptr, NUM_SEQS, CHUNK, 1) if PACKED else b
    start, Tq = bounds_of(s, cu_seqlens_ptr, Tq, PACKED)
    Tk = Tq if PACKED else Tk
    offset = clamp_offset(q_offset, Tq, Tk, IS_CAUSAL)
    r = tile_of_first_query(offset, CHUNK)
    if FROM_KEYS:
        r = tl.minimum(r, 0)
    r += tile
    if PACKED:
        r -= TILES_PER_NUMBER * first_tile_of(s, cu_seqlens_ptr, CHUNK, 1)
    return s, r, start, Tq, Tk, offset


@triton.jit
def locate_states(
    s, start, Tk, CHUNK: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """Return where the states of a sequence lie, and of how many chunks: one of each chunk, then one of each split."""
    chunks = tl.cdiv(Tk, CHUNK) if IS_CAUSAL else 0
    if not IS_CAUSAL:
        return s * SPLITS, chunks
    elif PACKED:
        return start // CHUNK + s * (1 + SPLITS), chunks
    else:
        return s * (chunks + SPLITS), chunks


@triton.jit
def splits_before(c, chunks, SPLITS: tl.constexpr, REVERSED: tl.constexpr):
    """Return how many whole splits chunk c adds up before it comes to the state of its own split."""
    split = c // tl.maximum(tl.cdiv(chunks, SPLITS), 1)
    if REVERSED:
        split = SPLITS - 1 - split
    return tl.where(c < chunks, split, SPLITS - 1)


@triton.jit
def nth_state(n, before, c, chunks, SPLITS: tl.constexpr, REVERSED: tl.constexpr):
    """Return the n-th state that chunk c adds up, n = 0 ... before: first whole splits, then that of its own chunk."""
    whole = chunks + SPLITS - 1 - n if REVERSED else chunks + n
    return tl.where((n == before) & (c < chunks), c, whole)
