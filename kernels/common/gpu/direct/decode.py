"""Few queries of many keys, as in decoding: the keys are split among programs, whose sums a second kernel adds up.

The query heads that share a key head lie in one tile, query i of head g at g T + i, so that keys and values are read
once. The sums have no order; those of softmax are brought to a common maximum.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.direct.forward import apply_sign, finalize
from linattn.kernels.common.gpu.direct.tile_schedule import key_range
from linattn.kernels.common.gpu.mainloop import accumulate_output, init_accumulators, unscale
from linattn.kernels.common.gpu.numerics import round_to


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    o_ptr,
    l_ptr,
    acc_ptr,
    m_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_mb,
    Hkv,
    GROUP,
    T,
    Tk,
    num_splits,
    split_length,
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
    SPLIT: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute o_i = sum_j p_ij v_j / l_i, or acc_i = sum_j p_ij v_j over the keys of a split.

    Grid: B * Hkv * num_splits. A split has `split_length` keys, a multiple of BLOCK_N. SPLIT: store sums, acc
    [num_splits, B, H, T, M] with l and m beside it, instead of the result.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps acc in registers from the first key to the last.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    split, head = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    batch, h = (head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_t, g, i = offs_t < GROUP * T, (offs_t // T).to(tl.int64), offs_t % T
    q_ptr += batch * stride_qb + h * GROUP * stride_qh
    q_tile = q_ptr + (g * stride_qh + i * stride_qt)[:, None] + offs_d[None, :]
    q = tl.load(q_tile, mask=mask_t[:, None] & (offs_d < D)[None, :], other=0.0)
    q, a = apply_sign(q, a, SIMILARITY)
    k_ptr += batch * stride_kb + h * stride_kh
    v_ptr += batch * stride_vb + h * stride_vh
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb

    acc, l, m = init_accumulators(BLOCK_T, BLOCK_DV, SIMILARITY)
    start = split * split_length
    end = tl.minimum(start + split_length, Tk)
    full, stop = key_range(0, T, end, q_offset, CAUSAL, KEY_MASK, BLOCK_N)
    for MASKED in tl.static_range(1, -1, -1):
        acc, l, m = accumulate_output(
            acc,
            l,
            m,
            q,
            k_ptr,
            v_ptr,
            key_mask_ptr,
            tl.maximum(full, start) if MASKED else start,
            stop if MASKED else full,
            end,
            i + q_offset,
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

    mask_o = mask_t[:, None] & (offs_dv < M)[None, :]
    if SPLIT:
        num_heads = tl.num_programs(0) // num_splits * GROUP
        query = (split.to(tl.int64) * num_heads + head * GROUP) * T + offs_t
        acc, l = unscale(acc, l, m, SIMILARITY, IN_DTYPE)
        tl.store(acc_ptr + query[:, None] * M + offs_dv[None, :], acc, mask=mask_o)
        tl.store(l_ptr + query, l, mask=mask_t)
        if SIMILARITY == "softmax":
            tl.store(m_ptr + query, m, mask=mask_t)
    else:
        o, l = finalize(acc, l, m, SIMILARITY, NORMALIZE, IN_DTYPE)
        o_ptr += batch * stride_ob + h * GROUP * stride_oh
        o_tile = o_ptr + (g * stride_oh + i * stride_ot)[:, None] + offs_dv[None, :]
        tl.store(o_tile, round_to(o, IN_DTYPE), mask=mask_o)
        tl.store(l_ptr + head.to(tl.int64) * GROUP * T + offs_t, l, mask=mask_t)


@triton.jit
def merge_kernel(
    acc_ptr,
    split_l_ptr,
    m_ptr,
    o_ptr,
    l_ptr,
    stride_o,
    H,
    T,
    M,
    num_splits,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute o_i = sum_s acc_si / sum_s l_si over the splits s of one query. Grid: B * H * T."""
    stride_ob, stride_oh, stride_ot = stride_o
    query = tl.program_id(0).to(tl.int64)
    offs_s, offs_dv = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DV)
    mask_s = offs_s < num_splits
    offs = offs_s * tl.num_programs(0).to(tl.int64) + query
    acc = tl.load(acc_ptr + offs[:, None] * M + offs_dv, mask=mask_s[:, None] & (offs_dv < M)[None, :], other=0.0)
    l = tl.load(split_l_ptr + offs, mask=mask_s, other=0.0)
    if SIMILARITY == "softmax":
        split_m = tl.load(m_ptr + offs, mask=mask_s, other=float("-inf"))
        m = tl.max(split_m, 0, keep_dims=True)
        decay = tl.exp2(split_m - tl.where(m == float("-inf"), 0.0, m))
        acc, l = acc * decay[:, None], l * decay
    else:
        m = tl.full([1], 1.0, tl.float32)
    acc, l = tl.sum(acc, 0, keep_dims=True), tl.sum(l, 0, keep_dims=True)
    o, l = finalize(acc, l, m, SIMILARITY, NORMALIZE, IN_DTYPE)
    batch, h, i = query // T // H, query // T % H, query % T
    o_tile = o_ptr + batch * stride_ob + h * stride_oh + i * stride_ot + offs_dv[None, :]
    tl.store(o_tile, round_to(o, IN_DTYPE), mask=(offs_dv < M)[None, :])
    tl.store(l_ptr + query + tl.arange(0, 1), l)
