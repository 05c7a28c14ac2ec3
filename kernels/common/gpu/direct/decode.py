"""Few queries of many keys, as in decoding: the keys are split among programs, whose sums a second kernel adds up.

The query heads that share a key head lie in one tile, row g T + i for query i of head g, so that keys and values are
read once. The sums have no order; those of softmax are brought to a common maximum.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.direct.forward import finished, signed
from linattn.kernels.common.gpu.direct.place import key_span
from linattn.kernels.common.gpu.numerics import rounded
from linattn.kernels.common.gpu.pairs import attend, no_sums, settled


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, out_ptr, l_ptr, acc_ptr, m_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mask,
    stride_ob, stride_oh, stride_ot,
    Hkv, G, T, Tk, S, splits, length, D, M, q_offset, a, b, c,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: B * Hkv * splits, each `length` keys, a multiple of BLOCK_K. SPLIT: write sums, acc [splits, B, H, T, M]
    with l and m beside it, instead of the result.
    """
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    batch, h = (head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    rows, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real, g, i = rows < G * T, (rows // T).to(tl.int64), rows % T
    q_ptr += batch * stride_qb + h * G * stride_qh
    q_tile = q_ptr + (g * stride_qh + i * stride_qt)[:, None] + offs_d[None, :]
    q = tl.load(q_tile, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
    q, a = signed(q, a, SIMILARITY)
    k_ptr += batch * stride_kb + h * stride_kh
    v_ptr += batch * stride_vb + h * stride_vh
    if KEY_MASK:
        mask_ptr += batch * stride_mask

    acc, l, m = no_sums(BLOCK_Q, BLOCK_M, SIMILARITY)
    start = split * length
    end = tl.minimum(start + length, Tk)
    full, stop = key_span(0, T, end, q_offset, CAUSAL, KEY_MASK, BLOCK_K)
    acc, l, m = attend(
        acc, l, m, q, k_ptr, v_ptr, mask_ptr, tl.maximum(full, start), stop, end, i + q_offset, stride_kt, stride_vt,
        D, M, a, b, c,
        SIMILARITY, CAUSAL, KEY_MASK, True, EVEN_D, EVEN_M, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    acc, l, m = attend(
        acc, l, m, q, k_ptr, v_ptr, mask_ptr, start, full, end, i + q_offset, stride_kt, stride_vt, D, M, a, b, c,
        SIMILARITY, CAUSAL, KEY_MASK, False, EVEN_D, EVEN_M, LOW, PRECISION, BLOCK_K, BLOCK_D, BLOCK_M,
    )  # fmt: skip

    if SPLIT:
        heads = tl.num_programs(0) // splits * G
        row = (split.to(tl.int64) * heads + head * G) * T + rows
        acc, l = settled(acc, l, m, SIMILARITY, LOW)
        tl.store(acc_ptr + row[:, None] * M + offs_m[None, :], acc, mask=real[:, None] & (offs_m < M)[None, :])
        tl.store(l_ptr + row, l, mask=real)
        if SIMILARITY == "softmax":
            tl.store(m_ptr + row, m, mask=real)
    else:
        out, l = finished(acc, l, m, SIMILARITY, NORMALIZE, LOW)
        out_ptr += batch * stride_ob + h * G * stride_oh
        out_tile = out_ptr + (g * stride_oh + i * stride_ot)[:, None] + offs_m[None, :]
        tl.store(out_tile, rounded(out, LOW), mask=real[:, None] & (offs_m < M)[None, :])
        tl.store(l_ptr + head.to(tl.int64) * G * T + rows, l, mask=real)


@triton.jit
def merge_kernel(
    acc_ptr, sums_ptr, m_ptr, out_ptr, l_ptr, stride_ob, stride_oh, stride_ot, H, T, M, splits,
    SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, LOW: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add up what the splits hold of one row. Grid: B * H * T."""
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_m = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_M)
    real = offs_s < splits
    place = offs_s * tl.num_programs(0).to(tl.int64) + row
    acc = tl.load(acc_ptr + place[:, None] * M + offs_m, mask=real[:, None] & (offs_m < M)[None, :], other=0.0)
    l = tl.load(sums_ptr + place, mask=real, other=0.0)
    if SIMILARITY == "softmax":
        of_split = tl.load(m_ptr + place, mask=real, other=float("-inf"))
        m = tl.max(of_split, 0, keep_dims=True)
        decay = tl.exp2(of_split - tl.where(m == float("-inf"), 0.0, m))
        acc, l = acc * decay[:, None], l * decay
    else:
        m = tl.full([1], 1.0, tl.float32)
    acc, l = tl.sum(acc, 0, keep_dims=True), tl.sum(l, 0, keep_dims=True)
    out, l = finished(acc, l, m, SIMILARITY, NORMALIZE, LOW)
    batch, h, i = row // T // H, row // T % H, row % T
    out_tile = out_ptr + batch * stride_ob + h * stride_oh + i * stride_ot + offs_m[None, :]
    tl.store(out_tile, rounded(out, LOW), mask=(offs_m < M)[None, :])
    tl.store(l_ptr + row + tl.arange(0, 1), l)
