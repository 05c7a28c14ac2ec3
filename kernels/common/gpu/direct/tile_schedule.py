"""Where a program of the direct form works: which head, which tile, over which range of the other side."""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.varlen_schedule import bounds_of, first_tile_of, sequence_of


@triton.jit
def locate_tile(
    cu_seqlens_ptr,
    num_heads,
    NUM_SEQS,
    num_tiles,
    own_length,
    other_length,
    REVERSED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Locate the tile that a program holds, out of `num_tiles` a head on a grid of num_tiles * B * num_heads.

    Returns batch element and head; the first token of the tile; and of its sequence the start (0 if not PACKED), the
    number of tokens on its own side, and on the other side. A tile beyond the sequence's end gets none of the latter.
    """
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    if REVERSED:
        tile = num_tiles - 1 - tile
    start = tl.full([], 0, tl.int64)
    if PACKED:
        sequence = sequence_of(tile, cu_seqlens_ptr, NUM_SEQS, BLOCK, 1)
        tile -= first_tile_of(sequence, cu_seqlens_ptr, BLOCK, 1)
        start, own_length = bounds_of(sequence, cu_seqlens_ptr, own_length, PACKED)
        start = start.to(tl.int64)
        other_length = tl.where(tile * BLOCK < own_length, own_length, 0)
    batch, h = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    return batch, h, tile * BLOCK, start, own_length, other_length


@triton.jit
def key_range(first, count, end, q_offset, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return, for queries first .. first + count, where the whole tiles of keys end that need no masks, and where those
    end that need some. Of the latter there is at least one: a loop that the compiler believes may be empty loses the
    matrix unit's asynchrony.
    """
    stop = end
    full = end - 1
    if CAUSAL:
        stop = tl.maximum(tl.minimum(end, first + count + q_offset), 0)
        full = tl.minimum(end - 1, first + q_offset + 1)
    if KEY_MASK:
        full = 0
    full = tl.maximum(full, 0) // BLOCK_N * BLOCK_N
    stop = tl.maximum(stop, full + 1)
    tl.assume(full < stop)
    return full, stop


@triton.jit
def query_range(first, count, end, q_offset, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return, for keys first .. first + count, where the queries begin that see any of them, in whole tiles, and those
    that see all of them; at least a tile apart if CAUSAL.
    """
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first - q_offset, 0), end) // BLOCK_T * BLOCK_T
        full = tl.minimum(tl.maximum(first + count - 1 - q_offset, 0), end)
        return begin, tl.maximum((full + BLOCK_T - 1) // BLOCK_T, begin // BLOCK_T + 1) * BLOCK_T
    else:
        return 0, 0
