"""Where a program works: in which sequence, on which rows, between which boundaries of chunks.

Keys of a sequence lie at positions 0, 1, ...; row i sees keys up to its own position i + q_offset. Boundary b is the
place before chunk b: a sum over keys "at boundary b" counts the keys before position b * CHUNK, and rows read it that
lie in chunk b. The last boundary counts all keys; rows beyond the last key read it too. Without causality there is one
chunk, every row reads the last boundary, and rows have no other position.

Where rows have seen fewer than 16 keys (or for the direct form beside a state), they read an earlier boundary
`reads[b]` instead, and compute the scores of all keys from there on; `rows_from[b]` is then the first position that
reads boundary b or a later one.
"""

import triton
import triton.language as tl

NOWHERE = tl.constexpr(1 << 30)
"""A position after all rows."""


@triton.jit
def base_of(sequence, cu_seqlens_ptr, SIZE, SPARE: tl.constexpr):
    """The number of the first piece of a packed sequence when sequences are cut into pieces of SIZE rows. A sequence
    gets at least SPARE - 1 more than it fills; so nobody has to count pieces.
    """
    return (tl.load(cu_seqlens_ptr + sequence) // SIZE).to(tl.int32) + SPARE * sequence


@triton.jit
def sequence_of(pid, cu_seqlens_ptr, S, SIZE, per_sequence, SPARE: tl.constexpr, PACKED: tl.constexpr):
    """The sequence that a piece belongs to and its number there, which may lie beyond the sequence's end."""
    if PACKED:
        low, high = 0, S
        while low + 1 < high:
            middle = (low + high) // 2
            if base_of(middle, cu_seqlens_ptr, SIZE, SPARE) <= pid:
                low = middle
            else:
                high = middle
        return low, pid - base_of(low, cu_seqlens_ptr, SIZE, SPARE)
    return pid // per_sequence, pid % per_sequence


@triton.jit
def span(sequence, cu_seqlens_ptr, T, PACKED: tl.constexpr):
    """The first row of a sequence in its batch element, and how many rows it has."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
        return start, tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int32) - start
    return 0, T


@triton.jit
def last_boundary(Tk, CHUNK, CAUSAL: tl.constexpr):
    return tl.cdiv(Tk, CHUNK) if CAUSAL else 1


@triton.jit
def slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL: tl.constexpr, PACKED: tl.constexpr):
    """Where the sums at boundary 0 of a sequence are kept; those at the other boundaries follow."""
    if PACKED and CAUSAL:
        return base_of(sequence, cu_seqlens_ptr, CHUNK, 2)
    return sequence * slots


@triton.jit
def first_reader(boundary, last, slot, rows_from_ptr, CHUNK, CAUSAL: tl.constexpr, TABLE: tl.constexpr):
    """The first position whose row reads this boundary or a later one; of boundary 0, before all rows."""
    if TABLE:
        position = tl.load(rows_from_ptr + slot + tl.minimum(boundary, last) - boundary).to(tl.int32)
    else:
        position = boundary * CHUNK if CAUSAL else 0
    position = tl.where(boundary > last, NOWHERE, position)
    return tl.where(boundary == 0, -NOWHERE, position)


@triton.jit
def rows_between(first, end, q_offset, Tq, CAUSAL: tl.constexpr):
    """The rows at positions [first, end): all or none without causality, where they all are at position 0."""
    if CAUSAL:
        return tl.minimum(tl.maximum(first - q_offset, 0), Tq), tl.minimum(tl.maximum(end - q_offset, 0), Tq)
    holds = (first <= 0) & (end > 0)
    return 0, tl.where(holds, Tq, 0)


@triton.jit
def read_boundary(position, last, slot, reads_ptr, CHUNK, CAUSAL: tl.constexpr, TABLE: tl.constexpr):
    """The boundary that a row reads; `slot` is that of boundary 0."""
    boundary = tl.minimum(tl.maximum(position, 0) // CHUNK, last) if CAUSAL else last
    if TABLE:
        boundary = tl.load(reads_ptr + slot + boundary).to(tl.int32)
    return boundary


@triton.jit
def existing(offs, first, T):
    """offs, moved so that rows first + offs exist: what is computed for the others is not stored."""
    return tl.minimum(tl.maximum(offs, -first), T - 1 - first)


@triton.jit
def head_of(ptr, batch, head, row, stride_b, stride_h, stride_t):
    """Where a head's rows from `row` on begin, all 64-bit numbers."""
    return ptr + batch * stride_b + head * stride_h + row * stride_t


@triton.jit
def tile_of_rows(
    pid, cu_seqlens_ptr, S, T, Tk, first_position, CHUNK, tiles, slots,
    BLOCK_Q: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_Q positions: the batch element, the first row of the sequence there, its numbers of rows and of
    keys, the tile's first position, the last boundary and the slot of boundary 0.
    """
    sequence, tile = sequence_of(pid, cu_seqlens_ptr, S, BLOCK_Q, tiles, 2, PACKED)
    start, T = span(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED)
    position = first_position + tile * BLOCK_Q
    return batch, tl.cast(start, tl.int64), T, Tk, position, last_boundary(Tk, CHUNK, CAUSAL), slot


@triton.jit
def place_of(slot, head, H, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, size):
    """Offsets of a slot's sums over pairs and of its record."""
    place = tl.cast(slot, tl.int64) * H + head
    return place * (BLOCK_D * (BLOCK_D + 16) // 2 * BLOCK_M), place * size
