"""Forward of the direct form: one program sums over all keys for one tile of queries of one head."""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.direct.tile_schedule import key_range, locate_tile
from linattn.kernels.common.gpu.mainloop import accumulate_output, init_accumulators, load_tile, unscale
from linattn.kernels.common.gpu.numerics import round_to

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def apply_sign(q, a, SIMILARITY: tl.constexpr):
    """Give queries the scale's sign: softmax looks for the largest product, which is then the largest score too."""
    if SIMILARITY == "softmax":
        return tl.where(a < 0, -q, q), tl.abs(a)
    else:
        return q, a


@triton.jit
def finalize(acc, l, m, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, IN_DTYPE: tl.constexpr):
    """Compute o = acc / l and the number that is kept of each query: l, for softmax the log-sum-exp. o is 0 where
    l <= 0: such a query saw no key, or lost its sum to cancellation. NaN stays NaN.
    """
    if NORMALIZE:
        o = acc / tl.where(l <= 0, float("inf"), l)[:, None]
        if SIMILARITY == "softmax":
            return o, (m + tl.log2(tl.where(l <= 0, 1.0, l))) * LN2
        else:
            _, l = unscale(acc, l, m, SIMILARITY, IN_DTYPE)
            return o, l
    else:
        return unscale(acc, l, m, SIMILARITY, IN_DTYPE)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    o_ptr,
    l_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
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
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute o_i = sum_j p_ij v_j / l_i with l_i = sum_j p_ij. Grid: num_tiles * B * H.

    GROUP query heads share a key head; NUM_SEQS sequences, 1 if not PACKED; l [B, H, T] is dense.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps acc in registers from the first key to the last.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    stride_lh = T
    # Of causal tiles the longest first.
    batch, h, first, start, T, Tk = locate_tile(
        cu_seqlens_ptr, H, NUM_SEQS, num_tiles, T, Tk, REVERSED=CAUSAL, PACKED=PACKED, BLOCK=BLOCK_T
    )
    q_ptr += batch * stride_qb + h * stride_qh + start * stride_qt
    k_ptr += batch * stride_kb + h // GROUP * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + h // GROUP * stride_vh + start * stride_vt
    o_ptr += batch * stride_ob + h * stride_oh + start * stride_ot
    l_ptr += (batch * H + h) * stride_lh + start
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_t = first + offs_t < T
    q = load_tile(q_ptr, first, stride_qt, mask_t, offs_t, offs_d, D, True, EVEN_D)
    q, a = apply_sign(q, a, SIMILARITY)
    acc, l, m = init_accumulators(BLOCK_T, BLOCK_DV, SIMILARITY)
    full, stop = key_range(first, BLOCK_T, Tk, q_offset, CAUSAL, KEY_MASK, BLOCK_N)
    # First the keys of which some are hidden, then those without masks, from the first on.
    for MASKED in tl.static_range(1, -1, -1):
        acc, l, m = accumulate_output(
            acc,
            l,
            m,
            q,
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
            EVEN_D=EVEN_D,
            EVEN_DV=EVEN_DV,
            IN_DTYPE=IN_DTYPE,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
        )
    o, l = finalize(acc, l, m, SIMILARITY, NORMALIZE, IN_DTYPE)
    o_tile = o_ptr + first.to(tl.int64) * stride_ot + (offs_t[:, None] * stride_ot + offs_dv[None, :])
    tl.store(o_tile, round_to(o, IN_DTYPE), mask=mask_t[:, None] & (offs_dv < M)[None, :])
    tl.store(l_ptr + first + offs_t, l, mask=mask_t)
