"""A tile of queries: out and row sums (QUERY), and dq (GRAD): the sums at its boundary and the scores of its chunk.

Where (1 + s)^2 vanishes for nearly all keys, the sums cancel and a row loses its digits. A tile that holds such a row,
one whose sum is `limit` times smaller than what it is made of, reads boundary 0 instead, which has no keys before it,
and computes all of its scores. The row is noted as lost to the sums, for the backward pass (GUARD).
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.mainloop import accumulate_dq, accumulate_output, init_accumulators, load_tile, unscale
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.quadratic.gpu.folded import pull_pairs, pull_record, read_pairs, read_record, read_row_sums
from linattn.kernels.quadratic.gpu.places import existing, head_of, place_of, read_boundary, tile_of_rows


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
    q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, l_ptr, lost_ptr, sums_ptr, record_ptr,
    cu_seqlens_ptr, reads_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_ob, stride_oh, stride_ot,
    S, T, Tk, H, D, M, q_offset, first_position, CHUNK, tiles, slots, size,
    a, b, c, weight_0, weight_1, weight_2, limit,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr, GUARD: tl.constexpr, EVEN: tl.constexpr,
    LOW: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, position, last, slot = tile_of_rows(
        tl.program_id(0), cu_seqlens_ptr, S, T, Tk, first_position, CHUNK, tiles, slots, BLOCK_Q, CAUSAL, PACKED
    )
    row_0 = position - q_offset
    if (row_0 >= T) | (T == 0):  # nothing here, not even a row to read in place of one that is not
        return
    q_ptr = head_of(q_ptr, batch, h, start + row_0, stride_qb, stride_qh, stride_qt)
    k_ptr = head_of(k_ptr, batch, h // GROUP, start, stride_kb, stride_kh, stride_kt)
    v_ptr = head_of(v_ptr, batch, h // GROUP, start, stride_vb, stride_vh, stride_vt)
    out_ptr = head_of(out_ptr, batch, h, start + row_0, stride_ob, stride_oh, stride_ot)
    row = (batch * H + h) * T_all + start + row_0
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real = (row_0 + offs_q >= 0) & (row_0 + offs_q < T)
    q_tile = q_ptr + existing(offs_q, row_0, T)[:, None] * stride_qt
    boundary = read_boundary(position, last, slot, reads_ptr, CHUNK, CAUSAL, TABLE)
    pairs, record = place_of(slot + boundary, h // GROUP, H // GROUP, BLOCK_D, BLOCK_M, size)
    folded_l, made_of = read_row_sums(
        q_tile, record_ptr + record, D, weight_0, weight_1, weight_2, BLOCK_D, BLOCK_M, EVEN, GRAM
    )
    if GUARD:
        lost = real & (made_of > limit * folded_l)
        tl.store(lost_ptr + row + offs_q, lost.to(tl.uint8), mask=real)
        any_lost = tl.max(lost.to(tl.int32), 0)
        boundary = tl.where(any_lost > 0, 0, boundary)
        folded_l = tl.where(any_lost > 0, 0.0, folded_l)
        pairs, record = place_of(slot + boundary, h // GROUP, H // GROUP, BLOCK_D, BLOCK_M, size)
    # The sums come first: after loops over pairs, Triton 3.6 has every product of this loop wait for the one before.
    folded = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    folded = read_pairs(folded, q_tile, sums_ptr + pairs, D, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
    folded = read_record(
        folded, q_tile, record_ptr + record, D, weight_0, weight_1, BLOCK_D, BLOCK_M, EVEN, FOLD, PRECISION
    )
    acc, l, m = init_accumulators(BLOCK_Q, BLOCK_M, SIMILARITY)
    if tl.float16 != LOW:  # pairs of fp16 are summed on a scale of their own
        acc, l = folded, folded_l
    q = load_tile(q_ptr, 0, stride_qt, real, offs_q, offs_d, D, True, EVEN)
    begin, full, stop = key_spans(position, boundary, Tk, CHUNK, CAUSAL, KEY_MASK, BLOCK_Q, BLOCK_K)
    acc, l, m = accumulate_output(
        acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, begin, full, Tk, position + offs_q, stride_kt, stride_vt, D, M,
        a, b, c, SIMILARITY, CAUSAL, KEY_MASK, False, EVEN, EVEN, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc, l, m = accumulate_output(
        acc, l, m, q, k_ptr, v_ptr, key_mask_ptr, full, stop, Tk, position + offs_q, stride_kt, stride_vt, D, M,
        a, b, c, SIMILARITY, CAUSAL, KEY_MASK, True, EVEN, EVEN, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc, l = unscale(acc, l, m, SIMILARITY, LOW)
    if tl.float16 == LOW:
        acc, l = acc + folded, l + folded_l
    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)[:, None]
    columns = real[:, None] & (offs_m < M)[None, :]
    tl.store(out_ptr + offs_q[:, None] * stride_ot + offs_m[None, :], round_to(acc, LOW), mask=columns)
    tl.store(l_ptr + row + offs_q, l, mask=real)


@triton.jit
def share_rows(
    out_ptr, dout_ptr, l_ptr, lost_ptr, shared_ptr, norm_ptr, delta_ptr, folded_delta_ptr,
    lost_norm_ptr, lost_tiles_ptr,
    stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    T, H, M,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, NORMALIZE: tl.constexpr, GUARD: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """What a row hands on: norm = 1/l, delta = dout.out, and for the sums dO' = norm dout, rounded, with the delta
    of just these rounded numbers. A row without a sum (l <= 0) hands nothing on, and a lost one nothing to the sums:
    its norm is given apart, and which tiles have such rows.
    """
    tile, h, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    offs_q, offs_m, first = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_M), tl.cast(tile * BLOCK_Q, tl.int64)
    real = first + offs_q < T
    inside = real[:, None] & (offs_m < M)[None, :]
    dout_ptr = head_of(dout_ptr, batch, h, first, stride_gb, stride_gh, stride_gt)
    dout = tl.load(dout_ptr + offs_q[:, None] * stride_gt + offs_m[None, :], mask=inside, other=0.0).to(tl.float32)
    place = (batch * H + h) * T + first + offs_q
    if NORMALIZE:
        out_ptr = head_of(out_ptr, batch, h, first, stride_ob, stride_oh, stride_ot)
        out = tl.load(out_ptr + offs_q[:, None] * stride_ot + offs_m[None, :], mask=inside, other=0.0).to(tl.float32)
        l = tl.load(l_ptr + place, mask=real, other=0.0)
        norm = 1.0 / tl.where(l <= 0, float("inf"), l)
        tl.store(norm_ptr + place, norm, mask=real)
        tl.store(delta_ptr + place, tl.sum(dout * out, 1), mask=real)
        if GUARD:
            lost = tl.load(lost_ptr + place, mask=real, other=0) != 0
            tl.store(lost_norm_ptr + place, tl.where(lost, norm, 0.0), mask=real)
            of_tile = (batch * H + h) * tl.num_programs(0) + tile
            tl.store(lost_tiles_ptr + of_tile, tl.max(lost.to(tl.int32), 0).to(tl.uint8))
            norm = tl.where(lost, 0.0, norm)
        shared = round_to(dout * norm[:, None], FOLD)
        tl.store(folded_delta_ptr + place, tl.sum(shared.to(tl.float32) * out, 1), mask=real)
    else:
        shared = round_to(dout, FOLD)
    tl.store(shared_ptr + place[:, None] * M + offs_m[None, :], shared, mask=inside)


@triton.jit
def pull_rows(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, dout_ptr, lost_ptr, shared_ptr, norm_ptr, delta_ptr, folded_delta_ptr, dq_ptr,
    sums_ptr, record_ptr, cu_seqlens_ptr, reads_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_gb, stride_gh, stride_gt, stride_dqb, stride_dqh, stride_dqt,
    S, T, Tk, H, D, M, q_offset, first_position, CHUNK, tiles, slots, size,
    a, b, c, slope, weight_1, weight_2,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr, GUARD: tl.constexpr, EVEN: tl.constexpr,
    LOW: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """Dq. A tile with lost rows computes all scores, as it did in `read_rows`."""
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, position, last, slot = tile_of_rows(
        tl.program_id(0), cu_seqlens_ptr, S, T, Tk, first_position, CHUNK, tiles, slots, BLOCK_Q, CAUSAL, PACKED
    )
    row_0 = position - q_offset
    if (row_0 >= T) | (T == 0):  # nothing here, not even a row to read in place of one that is not
        return
    q_ptr = head_of(q_ptr, batch, h, start + row_0, stride_qb, stride_qh, stride_qt)
    k_ptr = head_of(k_ptr, batch, h // GROUP, start, stride_kb, stride_kh, stride_kt)
    v_ptr = head_of(v_ptr, batch, h // GROUP, start, stride_vb, stride_vh, stride_vt)
    dout_ptr = head_of(dout_ptr, batch, h, start + row_0, stride_gb, stride_gh, stride_gt)
    dq_ptr = head_of(dq_ptr, batch, h, start + row_0, stride_dqb, stride_dqh, stride_dqt)
    row = (batch * H + h) * T_all + start + row_0
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real = (row_0 + offs_q >= 0) & (row_0 + offs_q < T)
    boundary = read_boundary(position, last, slot, reads_ptr, CHUNK, CAUSAL, TABLE)
    if GUARD:
        lost = tl.load(lost_ptr + row + offs_q, mask=real, other=0)
        boundary = tl.where(tl.max(lost.to(tl.int32), 0) > 0, 0, boundary)
    pairs, record = place_of(slot + boundary, h // GROUP, H // GROUP, BLOCK_D, BLOCK_M, size)
    # The sums come first, as above.
    q = load_tile(q_ptr, 0, stride_qt, real, offs_q, offs_d, D, True, EVEN)
    offs = existing(offs_q, row_0, T)[:, None]
    q_tile, shared_tile = q_ptr + offs * stride_qt, shared_ptr + row * M + offs * M
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dq = pull_pairs(dq, q_tile, shared_tile, sums_ptr + pairs, D, M, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        delta = tl.load(folded_delta_ptr + row + offs_q, mask=real, other=0.0)
    dq = pull_record(
        dq, q_tile, shared_tile, -delta, record_ptr + record, D, M, weight_1, weight_2, BLOCK_D, BLOCK_M, EVEN,
        NORMALIZE, FOLD, PRECISION, GRAM,
    )  # fmt: skip
    dq /= slope  # pairs leave their slope to the end
    dout = load_tile(dout_ptr, 0, stride_gt, real, offs_q, offs_m, M, True, EVEN)
    norm, delta = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        norm = tl.load(norm_ptr + row + offs_q, mask=real, other=0.0)
        delta = tl.load(delta_ptr + row + offs_q, mask=real, other=0.0)
    begin, full, stop = key_spans(position, boundary, Tk, CHUNK, CAUSAL, KEY_MASK, BLOCK_Q, BLOCK_K)
    dq = accumulate_dq(
        dq, q, dout, norm, delta, k_ptr, v_ptr, key_mask_ptr, begin, full, Tk, position + offs_q, stride_kt, stride_vt,
        D, M, a, b, c, SIMILARITY, CAUSAL, KEY_MASK, False, NORMALIZE, EVEN, EVEN, LOW, PRECISION,
        BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dq = accumulate_dq(
        dq, q, dout, norm, delta, k_ptr, v_ptr, key_mask_ptr, full, stop, Tk, position + offs_q, stride_kt, stride_vt,
        D, M, a, b, c, SIMILARITY, CAUSAL, KEY_MASK, True, NORMALIZE, EVEN, EVEN, LOW, PRECISION,
        BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dq *= slope
    columns = real[:, None] & (offs_d < D)[None, :]
    tl.store(dq_ptr + offs_q[:, None] * stride_dqt + offs_d[None, :], round_to(dq, LOW), mask=columns)
