"""A tile of keys: dk (GRAD) or dv (QUERY): the sums of later rows that read its boundary, and the rows that computed
its scores."""

import triton
import triton.language as tl

from ...common.gpu.numerics import rounded
from ...common.gpu.pairs import kept_keys, load_rows, pull_keys
from .folded import pull_pairs, pull_record, read_pairs, read_record
from .places import existing, first_reader, last_boundary, rows_between, sequence_of, slot_of, span


@triton.jit
def pull_folded_keys(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, dout_ptr, norm_ptr, delta_ptr, gradient_ptr,
    sums_ptr, record_ptr, cu_seqlens_ptr, rows_from_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    S, T, Tk, H, D, M, q_offset, CHUNK, tiles, slots, size,
    a, b, c, slope,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """`gradient` is dv if OF_VALUES, else dk. Sums and record carry all weights."""
    PAIRS: tl.constexpr = BLOCK_D // 16 * (BLOCK_D // 16 + 1) // 2
    h, T_all = tl.program_id(1), T
    sequence, tile = sequence_of(tl.program_id(0), cu_seqlens_ptr, S, BLOCK_K, tiles, 2, PACKED)
    start, length = span(sequence, cu_seqlens_ptr, Tk, PACKED)
    T, Tk = length if PACKED else T, length
    key_0 = tile * BLOCK_K
    if key_0 >= Tk:
        return
    batch, head = tl.cast(0 if PACKED else sequence, tl.int64), tl.cast(h, tl.int64)
    start = tl.cast(start, tl.int64)
    k_ptr += batch * stride_kb + head * stride_kh + (start + key_0) * stride_kt
    v_ptr += batch * stride_vb + head * stride_vh + (start + key_0) * stride_vt
    q_ptr += batch * stride_qb + head * GROUP * stride_qh + start * stride_qt
    dout_ptr += batch * stride_gb + head * GROUP * stride_gh + start * stride_gt
    row = (batch * H * GROUP + head * GROUP) * T_all + start
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start
    last = last_boundary(Tk, CHUNK, CAUSAL)
    boundary = key_0 // CHUNK + 1
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, slots, CAUSAL, PACKED) + boundary
    place = tl.cast(slot, tl.int64) * H + h
    sums_ptr += place * PAIRS * 256 * BLOCK_M
    record_ptr += place * size

    offs_k, offs_d, offs_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    keys = key_0 + offs_k
    keep = kept_keys(key_mask_ptr, keys, Tk, KEY_MASK)
    k = load_rows(k_ptr, 0, stride_kt, keep, offs_k, offs_d, D, True, EVEN)
    v = load_rows(v_ptr, 0, stride_vt, keep, offs_k, offs_m, M, True, EVEN)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    # The sums come first: after loops over pairs, Triton 3.6 has every product of this loop wait for the one before.
    offs = existing(offs_k, key_0, Tk)[:, None]
    k_tile, v_tile = k_ptr + offs * stride_kt, v_ptr + offs * stride_vt
    if OF_VALUES:
        dv = read_pairs(dv, k_tile, sums_ptr, D, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
        dv = read_record(dv, k_tile, record_ptr, D, 1.0, 1.0, BLOCK_D, BLOCK_M, EVEN, FOLD, PRECISION)
    else:
        dk = pull_pairs(dk, k_tile, v_tile, sums_ptr, D, M, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
        one = tl.full([BLOCK_K], 1.0, tl.float32)
        dk = pull_record(
            dk, k_tile, v_tile, one, record_ptr, D, M, 1.0, 1.0, BLOCK_D, BLOCK_M, EVEN, True, FOLD, PRECISION, GRAM
        )
        dk /= slope  # pairs leave their slope to the end
    end = first_reader(boundary, last, slot, rows_from_ptr, CHUNK, CAUSAL, TABLE)
    begin, stop = rows_between(key_0 if CAUSAL else 0, end, q_offset, T, CAUSAL)
    # Tiles of queries on the diagonal, then those that see all of these keys. If the compiler took it that a loop may
    # take no step, every matrix product would wait (ptxas: wgmma serialized): each takes one, if on rows that do not
    # count.
    full = begin
    if CAUSAL:
        diagonal = tl.maximum(key_0 + BLOCK_K - 1 - q_offset - begin, 0)
        full = tl.minimum(begin + tl.cdiv(diagonal, BLOCK_Q) * BLOCK_Q, stop)
    to_full, to_stop = tl.maximum(full, begin + 1), tl.maximum(stop, full + 1)
    tl.assume(to_full > begin)
    tl.assume(to_stop > full)
    for _ in tl.static_range(GROUP):
        if CAUSAL:
            dk, dv = pull_keys(
                dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr + row, delta_ptr + row, begin,
                to_full, full, q_offset, stride_qt, stride_gt, D, M, a, b, c,
                SIMILARITY, True, True, NORMALIZE, not OF_VALUES, OF_VALUES, EVEN, EVEN, LOW, PRECISION,
                BLOCK_Q, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        dk, dv = pull_keys(
            dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr + row, delta_ptr + row, full,
            to_stop, stop, q_offset, stride_qt, stride_gt, D, M, a, b, c,
            SIMILARITY, False, True, NORMALIZE, not OF_VALUES, OF_VALUES, EVEN, EVEN, LOW, PRECISION,
            BLOCK_Q, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        q_ptr += stride_qh
        dout_ptr += stride_gh
        row += T_all
    gradient_ptr += batch * stride_db + head * stride_dh + (start + key_0) * stride_dt
    if OF_VALUES:
        dv = tl.where(keep[:, None], dv, 0.0)
        inside = (keys < Tk)[:, None] & (offs_m < M)[None, :]
        tl.store(gradient_ptr + offs_k[:, None] * stride_dt + offs_m[None, :], rounded(dv, LOW), mask=inside)
    else:
        dk = tl.where(keep[:, None], dk * slope, 0.0)
        inside = (keys < Tk)[:, None] & (offs_d < D)[None, :]
        tl.store(gradient_ptr + offs_k[:, None] * stride_dt + offs_d[None, :], rounded(dk, LOW), mask=inside)
