"""Where a program of the direct form works: which head, which tile of rows, of which packed sequence, over what."""

import triton
import triton.language as tl


@triton.jit
def own_tile(cu_ptr, heads, S, tiles, own, other, REVERSED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The tile of rows that a program holds, out of `tiles` a head (`own` rows) on a grid of tiles * B * heads.

    Returns batch element and head; the first row of the tile; and of its sequence the start (0 if not PACKED), the
    number of own rows, and of rows on the other side. A tile beyond the sequence's end gets none of the latter.
    """
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if REVERSED:
        tile = tiles - 1 - tile
    start = tl.full([], 0, tl.int64)
    if PACKED:
        s, tile = find_tile(cu_ptr, tile, S, BLOCK)
        start, own = rows_of_sequence(cu_ptr, s)
        other = tl.where(tile * BLOCK < own, own, 0)
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), tile * BLOCK, start, own, other


@triton.jit
def find_tile(cu_ptr, tile, S, BLOCK: tl.constexpr):
    """The sequence to which a tile of packed rows belongs, and which of its tiles it is.

    Sequence s gets the tiles from floor(start_s / BLOCK) + s on: never fewer than it needs, so nobody has to count.
    The last of them may lie beyond its end.
    """
    low, high = 0, S
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(cu_ptr + low) // BLOCK + low).to(tl.int32)


@triton.jit
def rows_of_sequence(cu_ptr, s):
    """Where packed sequence s starts, and its length."""
    start = tl.load(cu_ptr + s).to(tl.int64)
    return start, (tl.load(cu_ptr + s + 1) - start).to(tl.int32)


@triton.jit
def key_span(first, rows, end, q_offset, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, BLOCK_K: tl.constexpr):
    """For queries first .. first + rows: where the whole tiles of keys end that need no masks, and where those end that
    need some. Of the latter there is at least one: a loop that the compiler believes may be empty loses the matrix
    unit's asynchrony.
    """
    stop = end
    full = end - 1
    if CAUSAL:
        stop = tl.maximum(tl.minimum(end, first + rows + q_offset), 0)
        full = tl.minimum(end - 1, first + q_offset + 1)
    if KEY_MASK:
        full = 0
    full = tl.maximum(full, 0) // BLOCK_K * BLOCK_K
    stop = tl.maximum(stop, full + 1)
    tl.assume(full < stop)
    return full, stop


@triton.jit
def query_span(first, rows, end, q_offset, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr):
    """For keys first .. first + rows: where the queries begin that see any of them, in whole tiles, and those that see
    all of them; at least a tile apart if CAUSAL.
    """
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first - q_offset, 0), end) // BLOCK_Q * BLOCK_Q
        full = tl.minimum(tl.maximum(first + rows - 1 - q_offset, 0), end)
        return begin, tl.maximum((full + BLOCK_Q - 1) // BLOCK_Q, begin // BLOCK_Q + 1) * BLOCK_Q
    return 0, 0
