"""Which sequence, which tokens and which state a program works on.

Keys of a sequence lie at positions 0, 1, ...; query i sees keys up to its own position i + q_offset. Boundary b is the
place before chunk b: a state "at boundary b" counts the keys before position b * CHUNK, and queries in chunk b multiply
with it. The last boundary counts all keys; queries beyond the last key multiply with it too. Without causality there is
one chunk, every query multiplies with the state at the last boundary, and queries have no other position. The states of
a sequence lie one after the other; its "slot" is where the one at boundary 0 lies.

Where queries have seen fewer than 16 keys (or for the direct form beside a state), two tables apply: they multiply with
the state at an earlier boundary `state_boundary[b]` instead, and compute the scores of all keys from there on;
`first_position[b]` is then the first position whose query multiplies with the state at b or at a later boundary.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.varlen_schedule import bounds_of, first_tile_of, sequence_of

NOWHERE = tl.constexpr(1 << 30)
"""A position after all queries."""

SPARE = tl.constexpr(2)
"""Tiles of a packed sequence beyond those before it (common/gpu/varlen_schedule.py): one boundary more than chunks,
and tiles of queries may begin before its first token."""


@triton.jit
def locate_tile(index, cu_seqlens_ptr, NUM_SEQS, SIZE, num_tiles, PACKED: tl.constexpr):
    """Return the sequence that a tile of SIZE tokens belongs to, and its number there, perhaps beyond the last."""
    if PACKED:
        sequence = sequence_of(index, cu_seqlens_ptr, NUM_SEQS, SIZE, SPARE)
        return sequence, index - first_tile_of(sequence, cu_seqlens_ptr, SIZE, SPARE)
    return index // num_tiles, index % num_tiles


@triton.jit
def first_run_of(sequence, cu_seqlens_ptr, SIZE, num_runs, PACKED: tl.constexpr):
    """Return the number of a sequence's first run of SIZE tokens, the inverse of `locate_tile`."""
    if PACKED:
        return first_tile_of(sequence, cu_seqlens_ptr, SIZE, SPARE)
    return sequence * num_runs


@triton.jit
def last_boundary(Tk, CHUNK, CAUSAL: tl.constexpr):
    """Return the boundary after all keys."""
    return tl.cdiv(Tk, CHUNK) if CAUSAL else 1


@triton.jit
def slot_of(sequence, cu_seqlens_ptr, CHUNK, num_boundaries, CAUSAL: tl.constexpr, PACKED: tl.constexpr):
    """Return where the state at boundary 0 of a sequence is kept; those at the other boundaries follow."""
    if PACKED and CAUSAL:
        return first_tile_of(sequence, cu_seqlens_ptr, CHUNK, SPARE)
    return sequence * num_boundaries


@triton.jit
def first_position(boundary, last, slot, first_position_ptr, CHUNK, CAUSAL: tl.constexpr, HAS_TABLES: tl.constexpr):
    """Return the first position whose query multiplies with the state at this boundary, in `slot`, or a later one; of
    boundary 0, a position before all queries.
    """
    if HAS_TABLES:
        position = tl.load(first_position_ptr + slot + tl.minimum(boundary, last) - boundary).to(tl.int32)
    else:
        position = boundary * CHUNK if CAUSAL else 0
    position = tl.where(boundary > last, NOWHERE, position)
    return tl.where(boundary == 0, -NOWHERE, position)


@triton.jit
def queries_between(first, end, q_offset, T, CAUSAL: tl.constexpr):
    """Return the queries at positions [first, end): all or none without causality, where all are at position 0."""
    if CAUSAL:
        return tl.minimum(tl.maximum(first - q_offset, 0), T), tl.minimum(tl.maximum(end - q_offset, 0), T)
    holds = (first <= 0) & (end > 0)
    return 0, tl.where(holds, T, 0)


@triton.jit
def tokens_of_boundary(
    boundary,
    last,
    slot,
    first_position_ptr,
    q_offset,
    T,
    CHUNK,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_TABLES: tl.constexpr,
):
    """Return which keys are added at a boundary (the chunk before it), or in reverse which queries multiply with just
    this state.
    """
    if REVERSE:
        first = first_position(boundary, last, slot, first_position_ptr, CHUNK, CAUSAL, HAS_TABLES)
        end = first_position(boundary + 1, last, slot + 1, first_position_ptr, CHUNK, CAUSAL, HAS_TABLES)
        begin, stop = queries_between(first, end, q_offset, T, CAUSAL)
    elif CAUSAL:
        begin, stop = tl.maximum((boundary - 1) * CHUNK, 0), tl.minimum(boundary * CHUNK, T)
    else:
        begin, stop = 0, T * boundary
    return begin, stop


@triton.jit
def state_boundary(position, last, slot, state_boundary_ptr, CHUNK, CAUSAL: tl.constexpr, HAS_TABLES: tl.constexpr):
    """Return the boundary whose state the query at a position multiplies with; `slot` is that of boundary 0."""
    boundary = tl.minimum(tl.maximum(position, 0) // CHUNK, last) if CAUSAL else last
    if HAS_TABLES:
        boundary = tl.load(state_boundary_ptr + slot + boundary).to(tl.int32)
    return boundary


@triton.jit
def clamp_to_sequence(offs, first, T):
    """Move offs so that tokens first + offs exist: what is computed for the others is not stored."""
    return tl.minimum(tl.maximum(offs, -first), T - 1 - first)


@triton.jit
def token_ptr(ptr, batch, head, token, stride):
    """Return where a head's tokens from `token` on begin; all are 64-bit numbers."""
    return ptr + batch * stride[0] + head * stride[1] + token * stride[2]


@triton.jit
def locate_query_tile(
    cu_seqlens_ptr,
    NUM_SEQS,
    T,
    Tk,
    position_0,
    CHUNK,
    num_tiles,
    num_boundaries,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Locate this program's tile of BLOCK positions, counted from `position_0` on. Return the batch element, the first
    token of the sequence there, its numbers of queries and of keys, the tile's first position, the last boundary and
    the slot of boundary 0.
    """
    sequence, tile = locate_tile(tl.program_id(0), cu_seqlens_ptr, NUM_SEQS, BLOCK, num_tiles, PACKED)
    start, T = bounds_of(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, num_boundaries, CAUSAL, PACKED)
    position = position_0 + tile * BLOCK
    return batch, tl.cast(start, tl.int64), T, Tk, position, last_boundary(Tk, CHUNK, CAUSAL), slot


@triton.jit
def locate_key_tile(
    cu_seqlens_ptr,
    NUM_SEQS,
    T,
    Tk,
    CHUNK,
    num_tiles,
    num_boundaries,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Locate this program's tile of keys. Return the batch element, the first token of the sequence there, its numbers
    of queries and of keys, the tile's first key, the first boundary after it, the last one, and the slot of the former.
    """
    batch, start, Tk, _, first_key, last, slot = locate_query_tile(
        cu_seqlens_ptr, NUM_SEQS, Tk, Tk, 0, CHUNK, num_tiles, num_boundaries, BLOCK_N, CAUSAL, PACKED
    )
    boundary = first_key // CHUNK + 1
    return batch, start, Tk if PACKED else T, Tk, first_key, boundary, last, slot + boundary


@triton.jit
def chunk_key_range(position, boundary, Tk, CHUNK, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, BLOCK_T, BLOCK_N):
    """Return where the keys start whose scores a tile of queries computes, beside the state at `boundary`; where those
    stop that need no mask; and where all stop.
    """
    start = boundary * CHUNK
    stop, full = Tk, Tk
    if CAUSAL:
        stop, full = tl.minimum(Tk, position + BLOCK_T), tl.minimum(Tk, position + 1)
    if KEY_MASK:
        full = start
    return start, start + tl.maximum(full - start, 0) // BLOCK_N * BLOCK_N, stop


@triton.jit
def state_offsets(slot, head, Hkv, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, moments_size):
    """Return the offsets of the products and of the moments of the state in a slot."""
    index = tl.cast(slot, tl.int64) * Hkv + head
    return index * (BLOCK_D * (BLOCK_D + 16) // 2 * BLOCK_DV), index * moments_size
