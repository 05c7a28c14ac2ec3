"""A tile of queries: out and row sums (QUERY), and dq (GRAD): the sums at its boundary and the scores of its chunk."""

import triton
import triton.language as tl

from ...common.gpu.numerics import rounded
from ...common.gpu.pairs import attend, load_rows, no_sums, pull_queries, settled
from .folded import pull_pairs, pull_record, read_pairs, read_record, read_row_sums
from .places import existing, last_boundary, read_boundary, sequence_of, slot_of, span


@triton.jit
def key_spans(position, boundary, Tk, CHUNK, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, BLOCK_Q, BLOCK_K):
    """Where the keys start whose scores a tile computes, where those stop that need no mask, and where all stop."""
    start = boundary * CHUNK
    stop, full = Tk, Tk
    if CAUSAL:
        stop, full = tl.minimum(Tk, position + BLOCK_Q), tl.minimum(Tk, position + 1)
    if KEY_MASK:
        full = start
    return start, start + tl.maximum(full - start, 0) // BLOCK_K * BLOCK_K, stop


@triton.jit
def read_rows(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, l_ptr, sums_ptr, record_ptr,
    cu_seqlens_ptr, reads_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_ob, stride_oh, stride_ot,
    S, T, Tk, H, D, M, q_offset, first_position, CHUNK, tiles, slots, size,
    a, b, c, weight_0, weight_1, weight_2,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_D // 16 * (BLOCK_D // 16 + 1) // 2
    h, T_all = tl.program_id(1), T
    sequence, tile = sequence_of(tl.program_id(0), cu_seqlens_ptr, S, BLOCK_Q, tiles, 2, PACKED)
    start, T = span(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    position = first_position + tile * BLOCK_Q
    row_0 = position - q_offset
    if row_0 >= T:
        return
    head = tl.cast(h, tl.int64)
    first = tl.cast(start + row_0, tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh + first * stride_qt
    k_ptr += batch * stride_kb + head // GROUP * stride_kh + tl.cast(start, tl.int64) * stride_kt
    v_ptr += batch * stride_vb + head // GROUP * stride_vh + tl.cast(start, tl.int64) * stride_vt
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start
    last = last_boundary(Tk, CHUNK, CAUSAL)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED)
    boundary = read_boundary(position, last, slot, reads_ptr, CHUNK, CAUSAL, TABLE)
    place = tl.cast(slot + boundary, tl.int64) * (H // GROUP) + h // GROUP
    sums_ptr += place * PAIRS * 256 * BLOCK_M
    record_ptr += place * size

    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    rows = row_0 + offs_q
    real = (rows >= 0) & (rows < T)
    # The sums come first: after loops over pairs, Triton 3.6 has every product of this loop wait for the one before.
    q_tile = q_ptr + existing(offs_q, row_0, T)[:, None] * stride_qt
    folded = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    folded = read_pairs(folded, q_tile, sums_ptr, D, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
    folded = read_record(folded, q_tile, record_ptr, D, weight_0, weight_1, BLOCK_D, BLOCK_M, EVEN, FOLD, PRECISION)
    folded_l = tl.zeros([BLOCK_Q], tl.float32)
    folded_l = read_row_sums(
        folded_l, q_tile, record_ptr, D, weight_0, weight_1, weight_2, BLOCK_D, BLOCK_M, EVEN, GRAM
    )
    acc, l, m = no_sums(BLOCK_Q, BLOCK_M, SIMILARITY)
    if tl.float16 != LOW:  # pairs of fp16 are summed on a scale of their own
        acc, l = folded, folded_l
    q = load_rows(q_ptr, 0, stride_qt, real, offs_q, offs_d, D, True, EVEN)
    begin, full, stop = key_spans(position, boundary, Tk, CHUNK, CAUSAL, KEY_MASK, BLOCK_Q, BLOCK_K)
    acc, l, m = attend(
        acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, begin, full, Tk, position + offs_q, stride_kt, stride_vt, D, M,
        a, b, c, SIMILARITY, CAUSAL, KEY_MASK, False, EVEN, EVEN, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, full, stop, Tk, position + offs_q, stride_kt, stride_vt, D, M,
        a, b, c, SIMILARITY, CAUSAL, KEY_MASK, True, EVEN, EVEN, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc, l = settled(acc, l, m, SIMILARITY, LOW)
    if tl.float16 == LOW:
        acc, l = acc + folded, l + folded_l
    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)[:, None]
    out_ptr += batch * stride_ob + head * stride_oh + first * stride_ot
    columns = real[:, None] & (offs_m < M)[None, :]
    tl.store(out_ptr + offs_q[:, None] * stride_ot + offs_m[None, :], rounded(acc, LOW), mask=columns)
    tl.store(l_ptr + (batch * H + head) * T_all + first + offs_q, l, mask=real)


@triton.jit
def share_rows(
    out_ptr, dout_ptr, l_ptr, shared_ptr, norm_ptr, delta_ptr, folded_delta_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    T, H, M,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, NORMALIZE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """What a row hands on: norm = 1/l, delta = dout.out, and for the sums dO' = norm dout, rounded, with the delta
    of just these rounded numbers. A row without a sum (l <= 0) hands nothing on."""
    tile, h, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_m, first = tl.arange(0, BLOCK_M), tl.cast(tile * BLOCK_Q, tl.int64)
    inside = (rows < T)[:, None] & (offs_m < M)[None, :]
    offs_q = tl.arange(0, BLOCK_Q)[:, None]
    dout_ptr += batch * stride_gb + h * stride_gh + first * stride_gt
    dout = tl.load(dout_ptr + offs_q * stride_gt + offs_m[None, :], mask=inside, other=0.0).to(tl.float32)
    place = (batch * H + h) * T + rows
    if NORMALIZE:
        out_ptr += batch * stride_ob + h * stride_oh + first * stride_ot
        out = tl.load(out_ptr + offs_q * stride_ot + offs_m[None, :], mask=inside, other=0.0).to(tl.float32)
        l = tl.load(l_ptr + place, mask=rows < T, other=0.0)
        norm = 1.0 / tl.where(l <= 0, float("inf"), l)
        shared = rounded(dout * norm[:, None], FOLD)
        tl.store(norm_ptr + place, norm, mask=rows < T)
        tl.store(delta_ptr + place, tl.sum(dout * out, 1), mask=rows < T)
        tl.store(folded_delta_ptr + place, tl.sum(shared.to(tl.float32) * out, 1), mask=rows < T)
    else:
        shared = rounded(dout, FOLD)
    tl.store(shared_ptr + place[:, None] * M + offs_m[None, :], shared, mask=inside)


@triton.jit
def pull_rows(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, dout_ptr, shared_ptr, norm_ptr, delta_ptr, folded_delta_ptr, dq_ptr,
    sums_ptr, record_ptr, cu_seqlens_ptr, reads_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    S, T, Tk, H, D, M, q_offset, first_position, CHUNK, tiles, slots, size,
    a, b, c, slope, weight_1, weight_2,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_D // 16 * (BLOCK_D // 16 + 1) // 2
    h, T_all = tl.program_id(1), T
    sequence, tile = sequence_of(tl.program_id(0), cu_seqlens_ptr, S, BLOCK_Q, tiles, 2, PACKED)
    start, T = span(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    position = first_position + tile * BLOCK_Q
    row_0 = position - q_offset
    if row_0 >= T:
        return
    head = tl.cast(h, tl.int64)
    first = tl.cast(start + row_0, tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh + first * stride_qt
    k_ptr += batch * stride_kb + head // GROUP * stride_kh + tl.cast(start, tl.int64) * stride_kt
    v_ptr += batch * stride_vb + head // GROUP * stride_vh + tl.cast(start, tl.int64) * stride_vt
    dout_ptr += batch * stride_gb + head * stride_gh + first * stride_gt
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start
    row = (batch * H + head) * T_all + first
    last = last_boundary(Tk, CHUNK, CAUSAL)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED)
    boundary = read_boundary(position, last, slot, reads_ptr, CHUNK, CAUSAL, TABLE)
    place = tl.cast(slot + boundary, tl.int64) * (H // GROUP) + h // GROUP
    sums_ptr += place * PAIRS * 256 * BLOCK_M
    record_ptr += place * size

    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    rows = row_0 + offs_q
    real = (rows >= 0) & (rows < T)
    # The sums come first, as above.
    q = load_rows(q_ptr, 0, stride_qt, real, offs_q, offs_d, D, True, EVEN)
    offs = existing(offs_q, row_0, T)[:, None]
    q_tile, shared_tile = q_ptr + offs * stride_qt, shared_ptr + row * M + offs * M
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dq = pull_pairs(dq, q_tile, shared_tile, sums_ptr, D, M, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        delta = tl.load(folded_delta_ptr + row + offs_q, mask=real, other=0.0)
    dq = pull_record(
        dq, q_tile, shared_tile, -delta, record_ptr, D, M, weight_1, weight_2, BLOCK_D, BLOCK_M, EVEN, NORMALIZE,
        FOLD, PRECISION, GRAM,
    )  # fmt: skip
    dq /= slope  # pairs leave their slope to the end
    dout = load_rows(dout_ptr, 0, stride_gt, real, offs_q, offs_m, M, True, EVEN)
    norm, delta = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        norm = tl.load(norm_ptr + row + offs_q, mask=real, other=0.0)
        delta = tl.load(delta_ptr + row + offs_q, mask=real, other=0.0)
    begin, full, stop = key_spans(position, boundary, Tk, CHUNK, CAUSAL, KEY_MASK, BLOCK_Q, BLOCK_K)
    dq = pull_queries(
        dq, q, dout, norm, delta, k_ptr, v_ptr, key_mask_ptr, begin, full, Tk, position + offs_q, stride_kt, stride_vt,
        D, M, a, b, c, SIMILARITY, CAUSAL, KEY_MASK, False, NORMALIZE, EVEN, EVEN, LOW, PRECISION,
        BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dq = pull_queries(
        dq, q, dout, norm, delta, k_ptr, v_ptr, key_mask_ptr, full, stop, Tk, position + offs_q, stride_kt, stride_vt,
        D, M, a, b, c, SIMILARITY, CAUSAL, KEY_MASK, True, NORMALIZE, EVEN, EVEN, LOW, PRECISION,
        BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dq *= slope
    dq_ptr += batch * stride_dqb + head * stride_dqh + first * stride_dqt
    columns = real[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptr + offs_q[:, None] * stride_dqt + offs_d[None, :], rounded(dq, LOW), mask=columns)
