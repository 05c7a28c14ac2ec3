"""Sums over keys at the boundaries of chunks (STATE), or over rows for the gradients to them, and their scan.

    pairs    sum x_i x_j y^T        blocks of 16 x 16 features [A, B <= A], each [256, M]; 2 c2 scale^2 folded in
    record   sum f x x^T, f x, x y^T, y, f    everything of degree 1 and 0 and the Gram matrix of the row sum, fp32

Forward x, y = k, v, f = 1, and a boundary counts the chunks before it. Reverse x, y = q, dO', f = -delta, and a
boundary counts the rows that read it or a later one: what a key before the boundary has to know.
Sums are first taken over runs of a few chunks, each in one program, then `scan_sums` adds what lies before a run.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.quadratic.gpu.places import (
    base_of,
    first_reader,
    last_boundary,
    rows_between,
    sequence_of,
    slot_of,
    span,
)

SLICE = tl.constexpr(16)
FEATURES = tl.constexpr(256)


@triton.jit
def product(a, b, LOW: tl.constexpr):
    """A * b rounded once to LOW; fp16 factors may leave their range, so they are multiplied in fp32."""
    if a.dtype == tl.float16:
        a = a.to(tl.float32)
    if b.dtype == tl.float16:
        b = b.to(tl.float32)
    return round_to(a * b, LOW)


@triton.jit
def block_of(pair, BLOCK_D: tl.constexpr):
    """Rows A and columns B <= A of block number A (A + 1) / 2 + B."""
    A = pair * 0
    for row in tl.static_range(1, BLOCK_D // 16):
        A += (pair >= row * (row + 1) // 2).to(tl.int32)
    return A, pair - A * (A + 1) // 2


@triton.jit
def load_slice(tile, columns, size, real, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Some columns of a tile of rows, of which those not `real` are 0."""
    if MASKED and EVEN:
        return tl.load(tile + columns[None, :], mask=real[:, None], other=0.0)
    if MASKED:
        return tl.load(tile + columns[None, :], mask=real[:, None] & (columns < size)[None, :], other=0.0)
    if EVEN:
        return tl.load(tile + columns[None, :])
    return tl.load(tile + columns[None, :], mask=(columns < size)[None, :], other=0.0)


@triton.jit
def group_rows(
    boundary, last, slot, rows_from_ptr, q_offset, T, CHUNK,
    REVERSE: tl.constexpr, CAUSAL: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Which keys come to the sums at a boundary (the chunk before it), or in reverse which rows read just this one."""
    if REVERSE:
        first = first_reader(boundary, last, slot, rows_from_ptr, CHUNK, CAUSAL, TABLE)
        end = first_reader(boundary + 1, last, slot + 1, rows_from_ptr, CHUNK, CAUSAL, TABLE)
        begin, stop = rows_between(first, end, q_offset, T, CAUSAL)
    elif CAUSAL:
        begin, stop = tl.maximum((boundary - 1) * CHUNK, 0), tl.minimum(boundary * CHUNK, T)
    else:
        begin, stop = 0, T * boundary
    return begin, stop


@triton.jit
def pair_sums(
    x_ptr, y_ptr, key_mask_ptr, sums_ptr, totals_ptr,
    cu_seqlens_ptr, rows_from_ptr,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, stride_mb,
    S, T, Tk, H, D, M, q_offset, CHUNK, RUN, runs, slots, weight,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
    TOTALS: tl.constexpr, EVEN: tl.constexpr, EVEN_T: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of features of one run of RUN rows. Causal: a run is some chunks (in reverse, boundaries), and the sum
    so far is stored at each. The sum of the whole run goes to `totals`. EVEN_T: all rows of all tiles count.
    """
    pair, h = tl.program_id(0), tl.program_id(2)
    PAIRS: tl.constexpr = BLOCK_D // 16 * (BLOCK_D // 16 + 1) // 2
    sequence, run = sequence_of(tl.program_id(1), cu_seqlens_ptr, S, RUN, runs, 2, PACKED)
    start, T = span(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    last = last_boundary(Tk, CHUNK, CAUSAL)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED)
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    x_ptr += batch * stride_xb + tl.cast(h * GROUP, tl.int64) * stride_xh
    y_ptr += batch * stride_yb + tl.cast(h * GROUP, tl.int64) * stride_yh
    A, B = block_of(pair, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    offs_a = A * SLICE + tl.arange(0, SLICE)
    offs_b = B * SLICE + tl.arange(0, SLICE)
    offs_m = tl.arange(0, BLOCK_M)
    offs = tl.arange(0, FEATURES)[:, None] * BLOCK_M + offs_m[None, :]

    acc = tl.zeros([FEATURES, BLOCK_M], tl.float32)
    if CAUSAL:
        chunks = RUN // CHUNK
        groups = tl.minimum(chunks, (last + 1 if REVERSE else last) - run * chunks)
        if (not REVERSE) & (run == 0):
            place = (tl.cast(slot, tl.int64) * H + h) * PAIRS + pair
            tl.store(sums_ptr + place * FEATURES * BLOCK_M + offs, round_to(acc, LOW))
    else:
        groups = 1
    for step in range(groups):
        if CAUSAL:
            boundary = last - run * chunks - step if REVERSE else run * chunks + step + 1
            begin, stop = group_rows(
                boundary, last, slot + boundary, rows_from_ptr, q_offset, T, CHUNK, REVERSE, CAUSAL, TABLE
            )
        else:
            boundary = last
            begin, stop = run * RUN, tl.minimum((run + 1) * RUN, T)
        for head in range(GROUP):
            for t in tl.range(begin, stop, BLOCK_T):
                row = tl.cast(start + t, tl.int64)
                real = offs_t < stop - t
                if MASKED:
                    real = real & tl.load(key_mask_ptr + batch * stride_mb + row + offs_t, mask=real, other=0)
                x_tile = x_ptr + row * stride_xt + tl.cast(head, tl.int64) * stride_xh + offs_t[:, None] * stride_xt
                y_tile = y_ptr + row * stride_yt + tl.cast(head, tl.int64) * stride_yh + offs_t[:, None] * stride_yt
                xa = load_slice(x_tile, offs_a, D, real, not EVEN_T, EVEN)
                xb = load_slice(x_tile, offs_b, D, real, not EVEN_T, EVEN)
                y = load_slice(y_tile, offs_m, M, real, not EVEN_T, EVEN)
                phi = product(tl.trans(xb)[:, None, :], tl.trans(xa)[None, :, :], LOW).reshape(FEATURES, BLOCK_T)
                acc = dot(phi, round_to(y, LOW), acc, PRECISION)
        if CAUSAL:
            place = (tl.cast(slot + boundary, tl.int64) * H + h) * PAIRS + pair
            tl.store(sums_ptr + place * FEATURES * BLOCK_M + offs, round_to(acc * weight, LOW))
    if TOTALS:
        place = (tl.cast(tl.program_id(1), tl.int64) * H + h) * PAIRS + pair
        tl.store(totals_ptr + place * FEATURES * BLOCK_M + offs, acc * weight if REVERSE else acc)


@triton.jit
def record_sums(
    x_ptr, y_ptr, f_ptr, key_mask_ptr, record_ptr,
    cu_seqlens_ptr, rows_from_ptr,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, stride_fb, stride_fh, stride_mb,
    S, T, Tk, H, D, M, q_offset, CHUNK, PART, parts, slots, size, weight_0, weight_1, weight_2,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
    FACTOR: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """The record of one chunk (causal), stored at its boundary, or of PART tokens, stored by program. Without FACTOR
    f = 1 forward, and in reverse, where rows are not normalised, f = 0.
    """
    h = tl.program_id(1)
    sequence, part = sequence_of(tl.program_id(0), cu_seqlens_ptr, S, PART, parts, 2, PACKED)
    start, T = span(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    if CAUSAL:
        last = last_boundary(Tk, CHUNK, CAUSAL)
        slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED) + part
        begin, stop = group_rows(part, last, slot, rows_from_ptr, q_offset, T, CHUNK, REVERSE, CAUSAL, TABLE)
    else:
        begin, stop = part * PART, tl.minimum((part + 1) * PART, T)
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    offs_t, offs_d, offs_m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    linear = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    x_sum, y_sum, count = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_M], tl.float32), 0.0
    for head in range(GROUP):
        x_head = x_ptr + batch * stride_xb + tl.cast(h * GROUP + head, tl.int64) * stride_xh
        y_head = y_ptr + batch * stride_yb + tl.cast(h * GROUP + head, tl.int64) * stride_yh
        for t in tl.range(begin, stop, BLOCK_T):
            row = tl.cast(start + t, tl.int64)
            real = offs_t < stop - t
            if MASKED:
                real = real & tl.load(key_mask_ptr + batch * stride_mb + row + offs_t, mask=real, other=0)
            real_x, real_y = real[:, None], real[:, None]
            if not EVEN:
                real_x, real_y = real_x & (offs_d[None, :] < D), real_y & (offs_m[None, :] < M)
            x_tile = x_head + row * stride_xt + offs_t[:, None] * stride_xt + offs_d[None, :]
            y_tile = y_head + row * stride_yt + offs_t[:, None] * stride_yt + offs_m[None, :]
            x, y = tl.load(x_tile, mask=real_x, other=0.0), tl.load(y_tile, mask=real_y, other=0.0)
            linear = dot(tl.trans(round_to(x, LOW)), round_to(y, LOW), linear, PRECISION)
            y_sum += tl.sum(y.to(tl.float32), 0)
            x = x.to(tl.float32)
            if FACTOR:
                f_head = batch * stride_fb + tl.cast(h * GROUP + head, tl.int64) * stride_fh
                fx = x * -tl.load(f_ptr + f_head + row + offs_t, mask=real, other=0.0)[:, None]
            else:
                fx = x
            if FACTOR or not REVERSE:
                gram = dot(tl.trans(x), fx, gram, GRAM)
                x_sum += tl.sum(fx, 0)
            if not REVERSE:
                count += tl.sum(real.to(tl.float32), 0)
    place = slot if CAUSAL else tl.program_id(0)
    record_ptr += (tl.cast(place, tl.int64) * H + h) * size
    tl.store(record_ptr + offs_d[:, None] * BLOCK_D + offs_d[None, :], gram * weight_2)
    record_ptr += BLOCK_D * BLOCK_D
    tl.store(record_ptr + offs_d[:, None] * BLOCK_M + offs_m[None, :], linear * weight_1)
    record_ptr += BLOCK_D * BLOCK_M
    tl.store(record_ptr + offs_d, x_sum * weight_1)
    tl.store(record_ptr + BLOCK_D + offs_m, y_sum * weight_0)
    tl.store(record_ptr + BLOCK_D + BLOCK_M + tl.arange(0, SLICE), tl.where(tl.arange(0, SLICE) == 0, count, 0.0))


@triton.jit
def scan(
    sums_ptr, totals_ptr, offset_ptr, end_ptr, offs, size, rows_from_ptr,
    sequence, h, H, T, last, slot, run_0, CHUNK, RUN, weight, EMPTY,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, CAUSAL: tl.constexpr, TABLE: tl.constexpr, IN_PLACE: tl.constexpr,
    OFFSET: tl.constexpr, END: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Some elements of one sequence and head: turn sums within runs into sums from the beginning (REVERSE: from the
    end). `offset` is what stands before all of them; what stands after goes to `end`. IN_PLACE: each run is one
    boundary, and its own total. EMPTY: nothing was stored, for want of keys.
    """
    inside = offs < size
    sums_ptr += (tl.cast(slot, tl.int64) * H + h) * size + offs
    totals_ptr += (tl.cast(run_0, tl.int64) * H + h) * size + offs
    step = tl.cast(H, tl.int64) * size
    of_sequence = (tl.cast(sequence, tl.int64) * H + h) * size + offs
    carry = tl.zeros([BLOCK], tl.float32)
    if OFFSET:
        carry = tl.load(offset_ptr + of_sequence, mask=inside, other=0.0)
    if CAUSAL:
        for i in range(last + 1):
            boundary = last - i if REVERSE else i
            local = tl.load(sums_ptr + boundary * step, mask=inside, other=0.0).to(tl.float32)
            total = tl.where(EMPTY, 0.0, local) + carry * weight
            tl.store(sums_ptr + boundary * step, round_to(total, LOW), mask=inside)
            if IN_PLACE:
                carry = total
            else:
                done = i + 1 if REVERSE else i
                if (done > 0) & ((done % (RUN // CHUNK) == 0) | (i == last)):
                    carry += tl.load(totals_ptr + (done - 1) // (RUN // CHUNK) * step, mask=inside, other=0.0)
    else:
        before = carry
        for i in range(tl.cdiv(T, RUN)):
            carry += tl.load(totals_ptr + i * step, mask=inside, other=0.0)
        after = carry
        if REVERSE:
            if TABLE:
                few = tl.load(rows_from_ptr + slot + 1) > 0
                after = tl.where(few, before, carry)
            before = carry
        tl.store(sums_ptr, round_to(before * weight, LOW), mask=inside)
        tl.store(sums_ptr + step, round_to(after * weight, LOW), mask=inside)
    if END:
        tl.store(end_ptr + of_sequence, carry, mask=inside)


@triton.jit
def scan_sums(
    sums_ptr, totals_ptr, offset_ptr, end_ptr, record_ptr, parts_ptr, record_offset_ptr, record_end_ptr,
    cu_seqlens_ptr, rows_from_ptr,
    T, Tk, H, size, CHUNK, RUN, runs, PART, parts, slots, weight,
    OF_PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    REVERSE: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
    OFFSET: tl.constexpr, END: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Scan the record, cut into parts of PART rows, and before it, in the first OF_PAIRS programs of a sequence and
    head, the sums over pairs, cut into runs of RUN rows.
    """
    block, sequence, h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, T = span(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    last = last_boundary(Tk, CHUNK, CAUSAL)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED)
    offs = tl.arange(0, BLOCK)
    if block < OF_PAIRS:
        run_0 = base_of(sequence, cu_seqlens_ptr, RUN, 2) if PACKED else sequence * runs
        scan(
            sums_ptr, totals_ptr, offset_ptr, end_ptr, block * BLOCK + offs, BLOCK_D * (BLOCK_D + 16) // 2 * BLOCK_M,
            rows_from_ptr, sequence, h, H, T, last, slot, run_0, CHUNK, RUN, weight, Tk == 0,
            BLOCK, REVERSE, CAUSAL, TABLE, False, OFFSET, END, LOW,
        )  # fmt: skip
    else:
        part_0 = base_of(sequence, cu_seqlens_ptr, PART, 2) if PACKED else sequence * parts
        scan(
            record_ptr, parts_ptr, record_offset_ptr, record_end_ptr, (block - OF_PAIRS) * BLOCK + offs, size,
            rows_from_ptr, sequence, h, H, T, last, slot, part_0, CHUNK, PART, 1.0, Tk == 0,
            BLOCK, REVERSE, CAUSAL, TABLE, CAUSAL, OFFSET, END, tl.float32,
        )  # fmt: skip
