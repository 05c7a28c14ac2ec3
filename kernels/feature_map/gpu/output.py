"""Forward: rows read the sums before their chunk and the scores inside it, and are divided by their row sum."""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.feature_map.gpu.layout import source, splits_before, stored_sums, tile_at
from linattn.kernels.feature_map.gpu.maps import key_features, load_rows, operand, query_features, store_rows


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def read_sums(
    q_ptr, k_ptr, v_ptr, out_ptr, l_ptr, key_mask_ptr, cu_seqlens_ptr, totals_ptr, sums_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_mb,
    places, sequences, Hkv, Tq, Tk, q_offset, W, scale,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the rows of one tile, BLOCK_M columns."""
    M_SLICES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    D_MASK: tl.constexpr = D if D % BLOCK_D else 0
    M_MASK: tl.constexpr = M if M % BLOCK_M else 0
    pid = tl.program_id(0)
    offs_m = pid % M_SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    place = pid // M_SLICES % places
    head = pid // M_SLICES // places % (Hkv * G)
    b = pid // M_SLICES // places // (Hkv * G)
    h = head // G
    offs_d = tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, CHUNK)
    row_stride = Tq  # of l
    s, r, start, Tq, Tk, offset = tile_at(
        place, b, cu_seqlens_ptr, sequences, Tq, Tk, q_offset, W, False, CHUNK, PACKED, IS_CAUSAL
    )
    first = r * CHUNK - offset
    if first >= Tq:
        return
    kept = (first + offs_t >= 0) & (first + offs_t < Tq)
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q = load_rows(q_ptr, start + first, stride_qt, offs_t, offs_d, kept, D_MASK)
    x = query_features(q, scale, offs_d, D_MASK, MAP, LOW)

    acc = tl.zeros([CHUNK, BLOCK_M], tl.float32)
    l = tl.zeros([CHUNK], tl.float32)
    base, chunks = stored_sums(s, start, Tk, CHUNK, SPLITS, PACKED, IS_CAUSAL)
    c = tl.maximum(r, 0) if IS_CAUSAL else chunks
    before = splits_before(c, chunks, SPLITS, False)
    for n in range(1 if SPLITS == 1 else before + 1):
        at = (base + source(n, before, c, chunks, SPLITS, False)).to(tl.int64) * Hkv + h
        S = load_rows(sums_ptr, at * D, M, offs_d, offs_m, offs_d < D, M_MASK)
        z = tl.load(totals_ptr + at * D + offs_d, mask=offs_d < D, other=0.0)
        acc = dot(x, S, acc, PRECISION)
        l += tl.sum(x.to(tl.float32) * z[None, :], 1)

    if IS_CAUSAL:
        k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
        v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
        offs_n = tl.arange(0, BLOCK_N)
        for n in tl.static_range(CHUNK // BLOCK_N):
            j = r * CHUNK + n * BLOCK_N
            seen = (j + offs_n >= 0) & (j + offs_n < Tk)
            if MASKED:
                at = b.to(tl.int64) * stride_mb + start + j
                seen &= tl.load(key_mask_ptr + at + offs_n, mask=seen, other=0) != 0
            k = load_rows(k_ptr, start + j, stride_kt, offs_n, offs_d, seen, D_MASK)
            k = key_features(k, seen, offs_d, D_MASK, MAP, LOW)
            p = dot(x, tl.trans(k), tl.zeros([CHUNK, BLOCK_N], tl.float32), PRECISION)
            p = round_to(tl.where(offs_t[:, None] >= n * BLOCK_N + offs_n[None, :], p, 0.0), LOW)
            l += tl.sum(p.to(tl.float32), 1)
            v = operand(load_rows(v_ptr, start + j, stride_vt, offs_n, offs_m, seen, M_MASK), LOW)
            acc = dot(p, v, acc, PRECISION)

    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)[:, None]
    out_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    store_rows(out_ptr, start + first, stride_ot, offs_t, offs_m, kept, M_MASK, acc)
    if pid % M_SLICES == 0:
        l_ptr += (b * Hkv * G + head).to(tl.int64) * row_stride + start + first
        tl.store(l_ptr + offs_t, l, mask=kept)
