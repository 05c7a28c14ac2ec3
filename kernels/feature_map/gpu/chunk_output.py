"""Forward: a tile of queries multiplies the state before its chunk and the scores inside it, and divides by its sum."""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.feature_map.gpu.chunk_schedule import locate_chunk, locate_states, nth_state, splits_before
from linattn.kernels.feature_map.gpu.maps import (
    load_key_features,
    load_query_features,
    load_slice,
    load_values,
    store_slice,
)


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def chunk_output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    l_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    S_ptr,
    z_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_mb,
    num_tiles,
    NUM_SEQS,
    Hkv,
    Tq,
    Tk,
    q_offset,
    TILES_PER_NUMBER,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    MAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute o = (x S + P v) / l, l = x z + P 1, with x = scale phi(q) and P = x phi(k)^T within the chunk.

    One program: one tile of CHUNK queries, BLOCK_DV columns.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps acc in registers throughout.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    M_SLICES: tl.constexpr = (M + BLOCK_DV - 1) // BLOCK_DV
    D_MASK: tl.constexpr = D if D % BLOCK_D else 0
    M_MASK: tl.constexpr = M if M % BLOCK_DV else 0
    pid = tl.program_id(0)
    offs_dv = pid % M_SLICES * BLOCK_DV + tl.arange(0, BLOCK_DV)
    tile = pid // M_SLICES % num_tiles
    head = pid // M_SLICES // num_tiles % (Hkv * GROUP)
    b = pid // M_SLICES // num_tiles // (Hkv * GROUP)
    h = head // GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, CHUNK)
    stride_lh = Tq
    s, r, start, Tq, Tk, offset = locate_chunk(
        tile, b, cu_seqlens_ptr, NUM_SEQS, Tq, Tk, q_offset, TILES_PER_NUMBER, CHUNK, PACKED, IS_CAUSAL, FROM_KEYS=False
    )
    first = r * CHUNK - offset
    if first >= Tq:
        return
    mask_t = (first + offs_t >= 0) & (first + offs_t < Tq)
    q_ptr += b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    x = load_query_features(q_ptr, start + first, stride_qt, scale, mask_t, offs_t, offs_d, D_MASK, MAP, PRODUCT_DTYPE)

    acc = tl.zeros([CHUNK, BLOCK_DV], tl.float32)
    l = tl.zeros([CHUNK], tl.float32)
    base, chunks = locate_states(s, start, Tk, CHUNK, SPLITS, PACKED, IS_CAUSAL)
    c = tl.maximum(r, 0) if IS_CAUSAL else chunks
    before = splits_before(c, chunks, SPLITS, REVERSED=False)
    for i in range(1 if SPLITS == 1 else before + 1):
        n = (base + nth_state(i, before, c, chunks, SPLITS, REVERSED=False)).to(tl.int64) * Hkv + h
        S = load_slice(S_ptr, n * D, M, offs_d < D, offs_d, offs_dv, M_MASK)
        z = tl.load(z_ptr + n * D + offs_d, mask=offs_d < D, other=0.0)
        # [CHUNK, D] @ [D, BLOCK_DV] -> [CHUNK, BLOCK_DV]
        acc = dot(x, S, acc, PRECISION)
        l += tl.sum(x.to(tl.float32) * z[None, :], 1)

    if IS_CAUSAL:
        k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
        v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
        offs_n = tl.arange(0, BLOCK_N)
        for i in tl.static_range(CHUNK // BLOCK_N):
            j = r * CHUNK + i * BLOCK_N
            mask_n = (j + offs_n >= 0) & (j + offs_n < Tk)
            if MASKED:
                offs_mask = b.to(tl.int64) * stride_mb + start + j + offs_n
                mask_n &= tl.load(key_mask_ptr + offs_mask, mask=mask_n, other=0) != 0
            f = load_key_features(k_ptr, start + j, stride_kt, mask_n, offs_n, offs_d, D_MASK, MAP, PRODUCT_DTYPE)
            # [CHUNK, D] @ [D, BLOCK_N] -> [CHUNK, BLOCK_N]
            p = dot(x, tl.trans(f), tl.zeros([CHUNK, BLOCK_N], tl.float32), PRECISION)
            p = round_to(tl.where(offs_t[:, None] >= i * BLOCK_N + offs_n[None, :], p, 0.0), PRODUCT_DTYPE)
            l += tl.sum(p.to(tl.float32), 1)
            v = load_values(v_ptr, start + j, stride_vt, mask_n, offs_n, offs_dv, M_MASK, PRODUCT_DTYPE)
            # [CHUNK, BLOCK_N] @ [BLOCK_N, BLOCK_DV] -> [CHUNK, BLOCK_DV]
            acc = dot(p, v, acc, PRECISION)

    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)[:, None]
    o_ptr += b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    store_slice(o_ptr, start + first, stride_ot, mask_t, offs_t, offs_dv, M_MASK, acc)
    if pid % M_SLICES == 0:
        l_ptr += (b * Hkv * GROUP + head).to(tl.int64) * stride_lh + start + first
        tl.store(l_ptr + offs_t, l, mask=mask_t)
