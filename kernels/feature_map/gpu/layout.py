"""Which rows, keys and sums a program works on.

Keys 0, CHUNK, 2 CHUNK, ... of a sequence begin a chunk. Row i stands at position p = i + q_offset and sees keys <= p,
so rows are cut at the same positions: tile r holds the rows at positions [r CHUNK, (r + 1) CHUNK). It reads the sums
over the chunks before r and the scores within chunk r. Tiles below 0 see no key of this call, tiles past the last chunk
see all of them. Not causal, offsets are 0 and every row sees all.

A packed sequence s that begins at `start` has its tiles from place W (start // CHUNK + s) on: sequences cannot collide,
so every program finds its own without a table made on the host. Places that no tile takes stay idle.
"""

import triton
import triton.language as tl


@triton.jit
def bounds(s, cu_seqlens_ptr, Tq, Tk, PACKED: tl.constexpr):
    """Where sequence s starts in its rows, and how many queries and keys it has."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + s).to(tl.int32)
        length = tl.load(cu_seqlens_ptr + s + 1).to(tl.int32) - start
        return start, length, length
    return tl.full([], 0, tl.int32), Tq, Tk


@triton.jit
def clamped(q_offset, Tq, Tk, IS_CAUSAL: tl.constexpr):
    """An offset beyond which nothing changes is as good as any other."""
    if IS_CAUSAL:
        return tl.minimum(tl.maximum(q_offset, -Tq), Tk)
    return tl.full([], 0, tl.int32)


@triton.jit
def first_tile(offset, CHUNK: tl.constexpr):
    """The tile of row 0."""
    return tl.where(offset >= 0, offset // CHUNK, -((CHUNK - 1 - offset) // CHUNK))


@triton.jit
def sequence_at(place, cu_seqlens_ptr, sequences, CHUNK: tl.constexpr):
    """The last packed sequence whose tiles begin at `place` or before."""
    owner = tl.full([], -1, tl.int32)
    for first in range(0, sequences, 128):
        s = first + tl.arange(0, 128)
        start = tl.load(cu_seqlens_ptr + s, mask=s < sequences, other=0).to(tl.int32)
        owner += tl.sum(((s < sequences) & (start // CHUNK + s <= place)).to(tl.int32))
    return owner


@triton.jit
def tile_at(
    place, b, cu_seqlens_ptr, sequences, Tq, Tk, q_offset, W,
    FROM_KEYS: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """The sequence and the tile of one place. FROM_KEYS: tiles of keys count, also those before the first row."""
    s = sequence_at(place // W, cu_seqlens_ptr, sequences, CHUNK) if PACKED else b
    start, Tq, Tk = bounds(s, cu_seqlens_ptr, Tq, Tk, PACKED)
    offset = clamped(q_offset, Tq, Tk, IS_CAUSAL)
    r = first_tile(offset, CHUNK)
    if FROM_KEYS:
        r = tl.minimum(r, 0)
    r += place
    if PACKED:
        r -= W * (start // CHUNK + s)
    return s, r, start, Tq, Tk, offset


@triton.jit
def stored_sums(s, start, Tk, CHUNK: tl.constexpr, SPLITS: tl.constexpr, PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Where the sums of a sequence lie, and for how many chunks: one for each chunk, then one for each split."""
    if not IS_CAUSAL:
        return s * SPLITS, 0
    chunks = tl.cdiv(Tk, CHUNK)
    if PACKED:
        return start // CHUNK + s * (1 + SPLITS), chunks
    return s * (chunks + SPLITS), chunks


@triton.jit
def splits_before(c, chunks, SPLITS: tl.constexpr, REVERSED: tl.constexpr):
    """How many whole splits a reader at chunk c adds up before it comes to the sums of its own split."""
    split = c // tl.maximum(tl.cdiv(chunks, SPLITS), 1)
    if REVERSED:
        split = SPLITS - 1 - split
    return tl.where(c < chunks, split, SPLITS - 1)


@triton.jit
def source(n, before, c, chunks, SPLITS: tl.constexpr, REVERSED: tl.constexpr):
    """The n-th sums that a reader at chunk c adds up, n = 0 ... before: whole splits, then those of its own chunk."""
    whole = chunks + SPLITS - 1 - n if REVERSED else chunks + n
    return tl.where((n == before) & (c < chunks), c, whole)
