"""Sums over keys, and the gradients to them, at every chunk.

    of keys, walked forwards:   S = sum phi(k_j) v_j^T     z = sum phi(k_j)         before each chunk
    of rows, walked backwards:  dS = sum x_i O_i^T         dz = -sum delta_i x_i    after each chunk

with x = scale phi(q), O = dout / l, delta = O.out. One program walks the chunks of one split of one sequence for
BLOCK_D features and all M columns, and keeps its sums in fp32 registers.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.feature_map.gpu.layout import bounds, clamped, first_tile, stored_sums
from linattn.kernels.feature_map.gpu.maps import key_features, load_rows, operand, query_features


@triton.jit
def load_row_gradient(
    dout_ptr, out_ptr, l_ptr, first, stride_dot, stride_ot, offs_t, offs_m, kept,
    SIZE: tl.constexpr, NORMALIZE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """O = dout / l, 0 where l <= 0, and what these columns give to delta, summed from the rounded O."""
    dout = load_rows(dout_ptr, first, stride_dot, offs_t, offs_m, kept, SIZE)
    if NORMALIZE:
        out = load_rows(out_ptr, first, stride_ot, offs_t, offs_m, kept, SIZE)
        l = tl.load(l_ptr + first + offs_t, mask=kept, other=1.0)
        do = round_to(dout.to(tl.float32) * (1 / tl.where(l <= 0, float("inf"), l))[:, None], LOW)
        return do, tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    return operand(dout, LOW), tl.zeros([dout.shape[0]], tl.float32)


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def scan_sums(
    x_ptr, w_ptr, out_ptr, l_ptr, key_mask_ptr, cu_seqlens_ptr,
    first_total_ptr, first_ptr, totals_ptr, sums_ptr, last_total_ptr, last_ptr,
    stride_xb, stride_xh, stride_xt, stride_wb, stride_wh, stride_wt, stride_ob, stride_oh, stride_ot,
    stride_mb,
    Hkv, Tq, Tk, q_offset, scale,
    OF_ROWS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x, w: keys and values, or queries and dout. first: where the walk starts, fp32 [S, Hkv, ...]. sums: what has been
    walked before each chunk and in each split, rounded. last: that of the splits in fp32, [S, SPLITS, Hkv, ...].
    """
    D_SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    D_MASK: tl.constexpr = D if D % BLOCK_D else 0
    M_MASK: tl.constexpr = M if M % BLOCK_M else 0
    HEADS: tl.constexpr = G if OF_ROWS else 1  # that are walked into the same sums
    pid = tl.program_id(0)
    offs_d = pid % D_SLICES * BLOCK_D + tl.arange(0, BLOCK_D)
    split = pid // D_SLICES % SPLITS
    h = pid // (D_SLICES * SPLITS) % Hkv
    s = pid // (D_SLICES * SPLITS) // Hkv
    offs_m = tl.arange(0, BLOCK_M)
    offs_t = tl.arange(0, CHUNK)
    b = s * 0 if PACKED else s
    row_stride = Tq  # of l
    start, Tq, Tk = bounds(s, cu_seqlens_ptr, Tq, Tk, PACKED)
    base, chunks = stored_sums(s, start, Tk, CHUNK, SPLITS, PACKED, IS_CAUSAL)

    # The chunks of this split. Rows before all keys belong to the first split, rows after all keys to the last one.
    if OF_ROWS:
        offset = clamped(q_offset, Tq, Tk, IS_CAUSAL)
        length = Tq
    else:
        offset = 0
        length = Tk
    tiles = chunks if IS_CAUSAL else tl.cdiv(length, CHUNK)
    per_split = tl.cdiv(tiles, SPLITS)
    lo = tl.minimum(split * per_split, tiles)
    hi = tl.minimum(lo + per_split, tiles)
    if OF_ROWS and IS_CAUSAL:
        lo = tl.where(split == 0, tl.minimum(lo, first_tile(offset, CHUNK)), lo)
        hi = tl.where(split == SPLITS - 1, tl.maximum(hi, tl.cdiv(Tq + offset, CHUNK)), hi)

    acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    inside = (offs_d < D)[:, None] & (offs_m < M)[None, :]
    if HAS_FIRST:
        at = (s * Hkv + h).to(tl.int64)
        begins = offs_d < tl.where(split == (SPLITS - 1 if OF_ROWS else 0), D, 0)
        tile = at * (D * M) + offs_d[:, None] * M + offs_m[None, :]
        acc = tl.load(first_ptr + tile, mask=inside & begins[:, None], other=0.0)
        total = tl.load(first_total_ptr + at * D + offs_d, mask=begins, other=0.0)

    steps = (hi - lo) * HEADS
    for n in range(tl.maximum(steps, 1)):  # once at least: a loop that may be empty would serialise the matrix unit
        if OF_ROWS:
            c, g = hi - 1 - n // HEADS, n % HEADS
        else:
            c, g = lo + n, 0
        if IS_CAUSAL:  # noqa: SIM102 (known when compiled; the next line is not)
            if (n < steps) & (g == 0) & (c >= 0) & (c < chunks):
                at = (base + c).to(tl.int64) * Hkv + h
                tile = at * (D * M) + offs_d[:, None] * M + offs_m[None, :]
                tl.store(sums_ptr + tile, round_to(acc, LOW), mask=inside)
                tl.store(totals_ptr + at * D + offs_d, total, mask=offs_d < D)
        first = c * CHUNK - offset
        kept = (first + offs_t >= 0) & (first + offs_t < tl.where(n < steps, length, 0))
        first += start
        head = h * HEADS + g
        if MASKED and not OF_ROWS:
            kept &= tl.load(key_mask_ptr + b.to(tl.int64) * stride_mb + first + offs_t, mask=kept, other=0) != 0
        x = x_ptr + b.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
        w = w_ptr + b.to(tl.int64) * stride_wb + head.to(tl.int64) * stride_wh
        x = load_rows(x, first, stride_xt, offs_t, offs_d, kept, D_MASK)
        if OF_ROWS:
            x = query_features(x, scale, offs_d, D_MASK, MAP, LOW)
            o = out_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
            l = l_ptr + (b * Hkv * HEADS + head).to(tl.int64) * row_stride
            w, delta = load_row_gradient(
                w, o, l, first, stride_wt, stride_ot, offs_t, offs_m, kept, M_MASK, NORMALIZE, LOW
            )
            if NORMALIZE:
                total -= tl.sum(x.to(tl.float32) * delta[:, None], 0)
        else:
            x = key_features(x, kept, offs_d, D_MASK, MAP, LOW)
            w = operand(load_rows(w, first, stride_wt, offs_t, offs_m, kept, M_MASK), LOW)
            total += tl.sum(x.to(tl.float32), 0)
        acc = dot(tl.trans(x), w, acc, PRECISION)

    at = (base + chunks + split).to(tl.int64) * Hkv + h
    tl.store(sums_ptr + at * (D * M) + offs_d[:, None] * M + offs_m[None, :], round_to(acc, LOW), mask=inside)
    tl.store(totals_ptr + at * D + offs_d, total, mask=offs_d < D)
    if HAS_LAST:
        at = (s * SPLITS + split).to(tl.int64) * Hkv + h
        tl.store(last_ptr + at * (D * M) + offs_d[:, None] * M + offs_m[None, :], acc, mask=inside)
        tl.store(last_total_ptr + at * D + offs_d, total, mask=offs_d < D)
