"""Backward of the direct form: one program for a tile of queries of one head, and one for a tile of keys and all query
heads that share it. Each sums alone, so nothing is added atomically and results repeat bit by bit.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.direct.place import key_span, own_tile, query_span
from linattn.kernels.common.gpu.numerics import rounded
from linattn.kernels.common.gpu.pairs import kept_keys, load_rows, pull_keys, pull_queries

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_terms(out, dout, l, SIMILARITY: tl.constexpr):
    """Norm and delta of a tile of queries (pairs.py). A row that is 0 for want of a sum gives nothing back."""
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if SIMILARITY == "softmax":
        return tl.where(l == float("-inf"), float("inf"), l * LOG2E), delta
    return 1.0 / tl.where(l <= 0, float("inf"), l), delta


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, out_ptr, dout_ptr, l_ptr, norm_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mask,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot, stride_dqb, stride_dqh, stride_dqt,
    H, G, T, Tk, S, tiles, D, M, q_offset, a, b, c, slope,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr, WANT_DQ: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Norm and delta, dense [B, H, T], of every query, and dq. Grid: tiles * B * H."""
    heads_apart = T  # in l, norm and delta
    # Of causal tiles the longest first.
    batch, h, first, start, T, Tk = own_tile(cu_ptr, H, S, tiles, T, Tk, CAUSAL, PACKED, BLOCK_Q)
    q_ptr += batch * stride_qb + h * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h // G * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + h // G * stride_vh + start * stride_vt
    out_ptr += batch * stride_ob + h * stride_oh + start * stride_ot
    dout_ptr += batch * stride_dob + h * stride_doh + start * stride_dot
    dq_ptr += batch * stride_dqb + h * stride_dqh + start * stride_dqt
    row = (batch * H + h) * heads_apart + start
    if KEY_MASK:
        mask_ptr += batch * stride_mask + start

    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real = first + offs_q < T
    dout = load_rows(dout_ptr, first, stride_dot, real, offs_q, offs_m, M, True, EVEN_M)
    norm, delta = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    if NORMALIZE:
        rows = row + first + offs_q
        out = load_rows(out_ptr, first, stride_ot, real, offs_q, offs_m, M, True, EVEN_M)
        norm, delta = row_terms(out, dout, tl.load(l_ptr + rows, mask=real, other=float("-inf")), SIMILARITY)
        tl.store(norm_ptr + rows, norm, mask=real)
        tl.store(delta_ptr + rows, delta, mask=real)
    if WANT_DQ:
        q = load_rows(q_ptr, first, stride_qt, real, offs_q, offs_d, D, True, EVEN_D)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        last = first + offs_q + q_offset
        full, stop = key_span(first, BLOCK_Q, Tk, q_offset, CAUSAL, KEY_MASK, BLOCK_K)
        dq = pull_queries(
            dq, q, dout, norm, delta, k_ptr, v_ptr, mask_ptr, full, stop, Tk, last, stride_kt, stride_vt, D, M, a, b, c,
            SIMILARITY, CAUSAL, KEY_MASK, True, NORMALIZE, EVEN_D, EVEN_M, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        dq = pull_queries(
            dq, q, dout, norm, delta, k_ptr, v_ptr, mask_ptr, 0, full, Tk, last, stride_kt, stride_vt, D, M, a, b, c,
            SIMILARITY, CAUSAL, KEY_MASK, False, NORMALIZE, EVEN_D, EVEN_M, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        dq_tile = dq_ptr + first.to(tl.int64) * stride_dqt + (offs_q[:, None] * stride_dqt + offs_d[None, :])
        tl.store(dq_tile, rounded(dq * slope, LOW), mask=real[:, None] & (offs_d < D)[None, :])


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, dout_ptr, norm_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mask,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    Hkv, T, Tk, S, tiles, D, M, q_offset, a, b, c, slope,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, G: tl.constexpr, RAGGED: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Dk and dv, summed over the G query heads of a key head. Grid: tiles * B * Hkv.

    RAGGED: the last tile of queries is not full.
    """
    heads_apart = T  # in norm and delta
    batch, h, first, start, Tk, T = own_tile(cu_ptr, Hkv, S, tiles, Tk, T, False, PACKED, BLOCK_K)
    q_ptr += batch * stride_qb + h * G * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + h * stride_vh + start * stride_vt
    dout_ptr += batch * stride_dob + h * G * stride_doh + start * stride_dot
    dk_ptr += batch * stride_dkb + h * stride_dkh + start * stride_dkt
    dv_ptr += batch * stride_dvb + h * stride_dvh + start * stride_dvt
    if NORMALIZE:
        norm_ptr += (batch * Hkv + h) * G * heads_apart + start
        delta_ptr += (batch * Hkv + h) * G * heads_apart + start
    if KEY_MASK:
        mask_ptr += batch * stride_mask + start

    offs_k, offs_d, offs_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    keys = first + offs_k
    keep = kept_keys(mask_ptr, keys, Tk, KEY_MASK)
    k = load_rows(k_ptr, first, stride_kt, keep, offs_k, offs_d, D, True, EVEN_D)
    v = load_rows(v_ptr, first, stride_vt, keep, offs_k, offs_m, M, True, EVEN_M)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    begin, full = query_span(first, BLOCK_K, T, q_offset, CAUSAL, BLOCK_Q)
    for _ in range(G):
        if CAUSAL:
            tl.assume(begin < full)  # or else the loop, if empty, would take the matrix unit's asynchrony from both
            dk, dv = pull_keys(
                dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr, delta_ptr, begin, full, T, q_offset, stride_qt,
                stride_dot, D, M, a, b, c, SIMILARITY, True, True, NORMALIZE, WANT_DK, WANT_DV, EVEN_D, EVEN_M, LOW,
                PRECISION, BLOCK_Q, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        dk, dv = pull_keys(
            dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr, delta_ptr, full, T, T, q_offset, stride_qt,
            stride_dot, D, M, a, b, c, SIMILARITY, False, RAGGED, NORMALIZE, WANT_DK, WANT_DV, EVEN_D, EVEN_M, LOW,
            PRECISION, BLOCK_Q, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        q_ptr += stride_qh
        dout_ptr += stride_doh
        if NORMALIZE:
            norm_ptr += heads_apart
            delta_ptr += heads_apart

    real = keys < Tk
    if WANT_DK:
        dk_tile = dk_ptr + first.to(tl.int64) * stride_dkt + (offs_k[:, None] * stride_dkt + offs_d[None, :])
        dk = tl.where(keep[:, None], dk * slope, 0.0)
        tl.store(dk_tile, rounded(dk, LOW), mask=real[:, None] & (offs_d < D)[None, :])
    if WANT_DV:
        dv_tile = dv_ptr + first.to(tl.int64) * stride_dvt + (offs_k[:, None] * stride_dvt + offs_m[None, :])
        dv = tl.where(keep[:, None], dv, 0.0)
        tl.store(dv_tile, rounded(dv, LOW), mask=real[:, None] & (offs_m < M)[None, :])
