"""Forward of the direct form: one program sums over all keys for one tile of queries of one head."""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.direct.place import key_span, own_tile
from linattn.kernels.common.gpu.numerics import rounded
from linattn.kernels.common.gpu.pairs import attend, load_rows, no_sums, settled

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def signed(q, a, SIMILARITY: tl.constexpr):
    """Softmax looks for the largest product; so that it is the largest score too, queries take the scale's sign."""
    if SIMILARITY == "softmax":
        return tl.where(a < 0, -q, q), tl.abs(a)
    return q, a


@triton.jit
def finished(acc, l, m, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, LOW: tl.constexpr):
    """Rows of the result, and the number that is kept of each: l, for softmax the log-sum-exp. 0 where l <= 0: such a
    row saw no key, or lost its sum to cancellation. NaN stays NaN.
    """
    if NORMALIZE:
        out = acc / tl.where(l <= 0, float("inf"), l)[:, None]
        if SIMILARITY == "softmax":
            return out, (m + tl.log2(tl.where(l <= 0, 1.0, l))) * LN2
        _, l = settled(acc, l, m, SIMILARITY, LOW)
        return out, l
    return settled(acc, l, m, SIMILARITY, LOW)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, out_ptr, l_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mask,
    stride_ob, stride_oh, stride_ot,
    H, G, T, Tk, S, tiles, D, M, q_offset, a, b, c,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: tiles * B * H. G query heads share a key head; S sequences, 1 if not PACKED; l [B, H, T] is dense."""
    heads_apart = T  # in l
    # Of causal tiles the longest first.
    batch, h, first, start, T, Tk = own_tile(cu_ptr, H, S, tiles, T, Tk, CAUSAL, PACKED, BLOCK_Q)
    q_ptr += batch * stride_qb + h * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h // G * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + h // G * stride_vh + start * stride_vt
    out_ptr += batch * stride_ob + h * stride_oh + start * stride_ot
    l_ptr += (batch * H + h) * heads_apart + start
    if KEY_MASK:
        mask_ptr += batch * stride_mask + start

    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real = first + offs_q < T
    q = load_rows(q_ptr, first, stride_qt, real, offs_q, offs_d, D, True, EVEN_D)
    q, a = signed(q, a, SIMILARITY)
    acc, l, m = no_sums(BLOCK_Q, BLOCK_M, SIMILARITY)
    last = first + offs_q + q_offset
    full, stop = key_span(first, BLOCK_Q, Tk, q_offset, CAUSAL, KEY_MASK, BLOCK_K)
    acc, l, m = attend(
        acc, l, m, q, k_ptr, v_ptr, mask_ptr, full, stop, Tk, last, stride_kt, stride_vt, D, M, a, b, c,
        SIMILARITY, CAUSAL, KEY_MASK, True, EVEN_D, EVEN_M, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, k_ptr, v_ptr, mask_ptr, 0, full, Tk, last, stride_kt, stride_vt, D, M, a, b, c,
        SIMILARITY, CAUSAL, KEY_MASK, False, EVEN_D, EVEN_M, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    out, l = finished(acc, l, m, SIMILARITY, NORMALIZE, LOW)
    out_tile = out_ptr + first.to(tl.int64) * stride_ot + (offs_q[:, None] * stride_ot + offs_m[None, :])
    tl.store(out_tile, rounded(out, LOW), mask=real[:, None] & (offs_m < M)[None, :])
    tl.store(l_ptr + first + offs_q, l, mask=real)
