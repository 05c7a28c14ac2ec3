"""Backward of the direct form: one program for a tile of queries of one head, and one for a tile of keys and all query
heads that share it. Each sums alone, so nothing is added atomically and results repeat bit by bit.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.direct.tile_schedule import key_range, locate_tile, query_range
from linattn.kernels.common.gpu.mainloop import accumulate_dkv, accumulate_dq, load_key_mask, load_tile
from linattn.kernels.common.gpu.numerics import round_to

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bwd_preprocess(o, dout, l, SIMILARITY: tl.constexpr):
    """Compute norm and delta of a tile of queries (mainloop.py). A query that is 0 for want of a sum gets norm 0."""
    delta = tl.sum(o.to(tl.float32) * dout.to(tl.float32), 1)
    if SIMILARITY == "softmax":
        return tl.where(l == float("-inf"), float("inf"), l * LOG2E), delta
    else:
        return 1.0 / tl.where(l <= 0, float("inf"), l), delta


@triton.jit
def store_tile(ptr, first, stride, mask, x, SIZE, IN_DTYPE: tl.constexpr):
    """Store rows first, first + 1, ... of a matrix where `mask`, columns below SIZE."""
    offs_t, offs_d = tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    tile = ptr + first.to(tl.int64) * stride + (offs_t[:, None] * stride + offs_d[None, :])
    tl.store(tile, round_to(x, IN_DTYPE), mask=mask[:, None] & (offs_d < SIZE)[None, :])


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    o_ptr,
    dout_ptr,
    l_ptr,
    norm_ptr,
    delta_ptr,
    dq_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
    stride_mb,
    H,
    GROUP,
    T,
    Tk,
    NUM_SEQS,
    num_tiles,
    D,
    M,
    q_offset,
    a,
    b,
    c,
    slope,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    NEEDS_DQ: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute dq_i = slope sum_j ds_ij k_j, and norm and delta of every query, dense [B, H, T].

    Grid: num_tiles * B * H.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps dq in registers from the first key to the last.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    stride_dob, stride_doh, stride_dot = stride_do
    stride_dqb, stride_dqh, stride_dqt = stride_dq
    stride_lh = T  # of norm and delta too
    # Of causal tiles the longest first.
    batch, h, first, start, T, Tk = locate_tile(
        cu_seqlens_ptr, H, NUM_SEQS, num_tiles, T, Tk, REVERSED=CAUSAL, PACKED=PACKED, BLOCK=BLOCK_T
    )
    q_ptr += batch * stride_qb + h * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h // GROUP * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + h // GROUP * stride_vh + start * stride_vt
    o_ptr += batch * stride_ob + h * stride_oh + start * stride_ot
    dout_ptr += batch * stride_dob + h * stride_doh + start * stride_dot
    dq_ptr += batch * stride_dqb + h * stride_dqh + start * stride_dqt
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_t = first + offs_t < T
    dout = load_tile(dout_ptr, first, stride_dot, mask_t, offs_t, offs_dv, M, True, EVEN_DV)
    norm, delta = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    if NORMALIZE:
        offs_l = (batch * H + h) * stride_lh + start + first + offs_t
        o = load_tile(o_ptr, first, stride_ot, mask_t, offs_t, offs_dv, M, True, EVEN_DV)
        norm, delta = bwd_preprocess(o, dout, tl.load(l_ptr + offs_l, mask=mask_t, other=float("-inf")), SIMILARITY)
        tl.store(norm_ptr + offs_l, norm, mask=mask_t)
        tl.store(delta_ptr + offs_l, delta, mask=mask_t)
    if NEEDS_DQ:
        q = load_tile(q_ptr, first, stride_qt, mask_t, offs_t, offs_d, D, True, EVEN_D)
        dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        full, stop = key_range(first, BLOCK_T, Tk, q_offset, CAUSAL, KEY_MASK, BLOCK_N)
        for MASKED in tl.static_range(1, -1, -1):
            dq = accumulate_dq(
                dq,
                q,
                dout,
                norm,
                delta,
                k_ptr,
                v_ptr,
                key_mask_ptr,
                full if MASKED else 0,
                stop if MASKED else full,
                Tk,
                first + offs_t + q_offset,
                stride_kt,
                stride_vt,
                D,
                M,
                a,
                b,
                c,
                SIMILARITY=SIMILARITY,
                CAUSAL=CAUSAL,
                KEY_MASK=KEY_MASK,
                MASKED=MASKED,
                NORMALIZE=NORMALIZE,
                EVEN_D=EVEN_D,
                EVEN_DV=EVEN_DV,
                IN_DTYPE=IN_DTYPE,
                PRECISION=PRECISION,
                BLOCK_N=BLOCK_N,
                BLOCK_D=BLOCK_D,
                BLOCK_DV=BLOCK_DV,
            )
        store_tile(dq_ptr, first, stride_dqt, mask_t, dq * slope, D, IN_DTYPE)


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
    stride_mb,
    Hkv,
    T,
    Tk,
    NUM_SEQS,
    num_tiles,
    D,
    M,
    q_offset,
    a,
    b,
    c,
    slope,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute dk_j = slope sum_i ds_ij q_i and dv_j = sum_i p_ij dout_i, over the GROUP query heads of a key head.

    Grid: num_tiles * B * Hkv. RAGGED: the last tile of queries is not full.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps dk and dv in registers from the first query to the last.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_dob, stride_doh, stride_dot = stride_do
    stride_dkb, stride_dkh, stride_dkt = stride_dk
    stride_dvb, stride_dvh, stride_dvt = stride_dv
    stride_lh = T  # of norm and delta
    batch, h, first, start, Tk, T = locate_tile(
        cu_seqlens_ptr, Hkv, NUM_SEQS, num_tiles, Tk, T, REVERSED=False, PACKED=PACKED, BLOCK=BLOCK_N
    )
    q_ptr += batch * stride_qb + h * GROUP * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + h * stride_vh + start * stride_vt
    dout_ptr += batch * stride_dob + h * GROUP * stride_doh + start * stride_dot
    dk_ptr += batch * stride_dkb + h * stride_dkh + start * stride_dkt
    dv_ptr += batch * stride_dvb + h * stride_dvh + start * stride_dvt
    if NORMALIZE:
        norm_ptr += (batch * Hkv + h) * GROUP * stride_lh + start
        delta_ptr += (batch * Hkv + h) * GROUP * stride_lh + start
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = first + offs_n
    mask_n = load_key_mask(key_mask_ptr, keys, Tk, KEY_MASK)
    k = load_tile(k_ptr, first, stride_kt, mask_n, offs_n, offs_d, D, True, EVEN_D)
    v = load_tile(v_ptr, first, stride_vt, mask_n, offs_n, offs_dv, M, True, EVEN_DV)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, full = query_range(first, BLOCK_N, T, q_offset, CAUSAL, BLOCK_T)
    for _ in range(GROUP):
        # First, if causal, the queries that see some of these keys, then those that see all of them.
        for MASKED in tl.static_range(1 if CAUSAL else 0, -1, -1):
            if MASKED:
                tl.assume(begin < full)  # or else the loop, if empty, would take the matrix unit's asynchrony from both
            dk, dv = accumulate_dkv(
                dk,
                dv,
                k,
                v,
                keys,
                q_ptr,
                dout_ptr,
                norm_ptr,
                delta_ptr,
                begin if MASKED else full,
                full if MASKED else T,
                T,
                q_offset,
                stride_qt,
                stride_dot,
                D,
                M,
                a,
                b,
                c,
                SIMILARITY=SIMILARITY,
                MASKED=MASKED,
                RAGGED=True if MASKED else RAGGED,
                NORMALIZE=NORMALIZE,
                NEEDS_DK=NEEDS_DK,
                NEEDS_DV=NEEDS_DV,
                EVEN_D=EVEN_D,
                EVEN_DV=EVEN_DV,
                IN_DTYPE=IN_DTYPE,
                PRECISION=PRECISION,
                BLOCK_T=BLOCK_T,
                BLOCK_D=BLOCK_D,
                BLOCK_DV=BLOCK_DV,
            )
        q_ptr += stride_qh
        dout_ptr += stride_doh
        if NORMALIZE:
            norm_ptr += stride_lh
            delta_ptr += stride_lh

    if NEEDS_DK:
        dk = tl.where(mask_n[:, None], dk * slope, 0.0)
        store_tile(dk_ptr, first, stride_dkt, keys < Tk, dk, D, IN_DTYPE)
    if NEEDS_DV:
        dv = tl.where(mask_n[:, None], dv, 0.0)
        store_tile(dv_ptr, first, stride_dvt, keys < Tk, dv, M, IN_DTYPE)
