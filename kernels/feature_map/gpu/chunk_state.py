"""States of chunks, and the gradients to them.

    over keys, forwards:      S = sum phi(k_j) v_j^T     z = sum phi(k_j)         before each chunk
    over queries, backwards:  dS = sum x_i O_i^T         dz = -sum delta_i x_i    after each chunk

with x = scale phi(q), O = dout / l, delta = O.out. One program scans the chunks of one split of one sequence for
BLOCK_D features and all M columns, and keeps its sums in fp32 registers.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.common.gpu.varlen_schedule import bounds_of
from linattn.kernels.feature_map.gpu.chunk_schedule import clamp_offset, locate_states, tile_of_first_query
from linattn.kernels.feature_map.gpu.maps import (
    as_factor,
    load_key_features,
    load_query_features,
    load_slice,
    load_values,
)


@triton.jit
def load_dout_scaled(
    dout_ptr,
    o_ptr,
    l_ptr,
    first,
    stride_dot,
    stride_ot,
    mask,
    offs_t,
    offs_dv,
    SIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
):
    """Load O = dout / l, 0 where l <= 0, and what these columns add to delta, summed from the rounded O."""
    dout = load_slice(dout_ptr, first, stride_dot, mask, offs_t, offs_dv, SIZE)
    if NORMALIZE:
        out = load_slice(o_ptr, first, stride_ot, mask, offs_t, offs_dv, SIZE)
        l = tl.load(l_ptr + first + offs_t, mask=mask, other=1.0)
        O = round_to(dout.to(tl.float32) * (1 / tl.where(l <= 0, float("inf"), l))[:, None], PRODUCT_DTYPE)
        return O, tl.sum(O.to(tl.float32) * out.to(tl.float32), 1)
    else:
        return as_factor(dout, PRODUCT_DTYPE), tl.zeros([dout.shape[0]], tl.float32)


@triton.jit
def split_range(
    split,
    chunks,
    Tq,
    Tk,
    q_offset,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Return the chunks begin..end of a split, the offset of its tokens and how many tokens there are. Queries before
    all keys belong to the first split, queries after all keys to the last one.
    """
    if REVERSE:
        offset = clamp_offset(q_offset, Tq, Tk, IS_CAUSAL)
        length = Tq
    else:
        offset = 0
        length = Tk
    tiles = chunks if IS_CAUSAL else tl.cdiv(length, CHUNK)
    per_split = tl.cdiv(tiles, SPLITS)
    begin = tl.minimum(split * per_split, tiles)
    end = tl.minimum(begin + per_split, tiles)
    if REVERSE and IS_CAUSAL:
        begin = tl.where(split == 0, tl.minimum(begin, tile_of_first_query(offset, CHUNK)), begin)
        end = tl.where(split == SPLITS - 1, tl.maximum(end, tl.cdiv(Tq + offset, CHUNK)), end)
    return begin, end, offset, length


@triton.jit
def store_state(S_ptr, z_ptr, n, S, z, mask, offs_d, offs_dv, D: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr):
    """Store S [D, M] and z [D] as the n-th state; z in fp32."""
    tl.store(S_ptr + n * (D * M) + offs_d[:, None] * M + offs_dv[None, :], round_to(S, DTYPE), mask=mask)
    tl.store(z_ptr + n * D + offs_d, z, mask=offs_d < D)


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def chunk_state_kernel(
    x_ptr,
    y_ptr,
    o_ptr,
    l_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    initial_S_ptr,
    initial_z_ptr,
    S_ptr,
    z_ptr,
    final_S_ptr,
    final_z_ptr,
    stride_x,
    stride_y,
    stride_o,
    stride_mb,
    Hkv,
    Tq,
    Tk,
    q_offset,
    scale,
    REVERSE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    MAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute S += sum phi(k) v^T, z += sum phi(k) over keys; REVERSE: S += sum x O^T, z -= sum delta x over queries.

    x, y: keys and values, or queries and dout. initial: where the scan starts, fp32 [NUM_SEQS, Hkv, ...]. S: what was
    summed before each chunk and in each split, rounded. final: that of the splits, fp32 [NUM_SEQS, SPLITS, Hkv, ...].
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps S in registers from the first chunk of its split to the last.
    stride_xb, stride_xh, stride_xt = stride_x
    stride_yb, stride_yh, stride_yt = stride_y
    stride_ob, stride_oh, stride_ot = stride_o
    D_SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    D_MASK: tl.constexpr = D if D % BLOCK_D else 0
    M_MASK: tl.constexpr = M if M % BLOCK_DV else 0
    HEADS: tl.constexpr = GROUP if REVERSE else 1  # that are summed into the same state
    pid = tl.program_id(0)
    offs_d = pid % D_SLICES * BLOCK_D + tl.arange(0, BLOCK_D)
    split = pid // D_SLICES % SPLITS
    h = pid // (D_SLICES * SPLITS) % Hkv
    s = pid // (D_SLICES * SPLITS) // Hkv
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_t = tl.arange(0, CHUNK)
    b = s * 0 if PACKED else s
    stride_lh = Tq
    start, Tq = bounds_of(s, cu_seqlens_ptr, Tq, PACKED)
    Tk = Tq if PACKED else Tk
    base, chunks = locate_states(s, start, Tk, CHUNK, SPLITS, PACKED, IS_CAUSAL)
    begin, end, offset, length = split_range(split, chunks, Tq, Tk, q_offset, REVERSE, CHUNK, SPLITS, IS_CAUSAL)

    S = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    z = tl.zeros([BLOCK_D], tl.float32)
    mask_S = (offs_d < D)[:, None] & (offs_dv < M)[None, :]
    if HAS_INITIAL:
        n = (s * Hkv + h).to(tl.int64)
        is_first = offs_d < tl.where(split == (SPLITS - 1 if REVERSE else 0), D, 0)
        tile = n * (D * M) + offs_d[:, None] * M + offs_dv[None, :]
        S = tl.load(initial_S_ptr + tile, mask=mask_S & is_first[:, None], other=0.0)
        z = tl.load(initial_z_ptr + n * D + offs_d, mask=is_first, other=0.0)

    steps = (end - begin) * HEADS
    for i in range(tl.maximum(steps, 1)):  # once at least: a loop that may be empty would serialise the matrix unit
        if REVERSE:
            c, g = end - 1 - i // HEADS, i % HEADS
        else:
            c, g = begin + i, 0
        if IS_CAUSAL:  # noqa: SIM102 (known when compiled; the next line is not)
            if (i < steps) & (g == 0) & (c >= 0) & (c < chunks):
                n = (base + c).to(tl.int64) * Hkv + h
                store_state(S_ptr, z_ptr, n, S, z, mask_S, offs_d, offs_dv, D, M, PRODUCT_DTYPE)
        first = c * CHUNK - offset
        mask_t = (first + offs_t >= 0) & (first + offs_t < tl.where(i < steps, length, 0))
        first += start
        head = h * HEADS + g
        if MASKED and not REVERSE:
            mask_t &= tl.load(key_mask_ptr + b.to(tl.int64) * stride_mb + first + offs_t, mask=mask_t, other=0) != 0
        x_head = x_ptr + b.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
        y_head = y_ptr + b.to(tl.int64) * stride_yb + head.to(tl.int64) * stride_yh
        if REVERSE:
            x = load_query_features(x_head, first, stride_xt, scale, mask_t, offs_t, offs_d, D_MASK, MAP, PRODUCT_DTYPE)
            o_head = o_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
            l_head = l_ptr + (b * Hkv * HEADS + head).to(tl.int64) * stride_lh
            y, delta = load_dout_scaled(
                y_head,
                o_head,
                l_head,
                first,
                stride_yt,
                stride_ot,
                mask_t,
                offs_t,
                offs_dv,
                SIZE=M_MASK,
                NORMALIZE=NORMALIZE,
                PRODUCT_DTYPE=PRODUCT_DTYPE,
            )
            if NORMALIZE:
                z -= tl.sum(x.to(tl.float32) * delta[:, None], 0)
        else:
            x = load_key_features(x_head, first, stride_xt, mask_t, offs_t, offs_d, D_MASK, MAP, PRODUCT_DTYPE)
            y = load_values(y_head, first, stride_yt, mask_t, offs_t, offs_dv, M_MASK, PRODUCT_DTYPE)
            z += tl.sum(x.to(tl.float32), 0)
        # [BLOCK_D, CHUNK] @ [CHUNK, BLOCK_DV] -> [BLOCK_D, BLOCK_DV]
        S = dot(tl.trans(x), y, S, PRECISION)

    n = (base + chunks + split).to(tl.int64) * Hkv + h
    store_state(S_ptr, z_ptr, n, S, z, mask_S, offs_d, offs_dv, D, M, PRODUCT_DTYPE)
    if HAS_FINAL:
        n = (s * SPLITS + split).to(tl.int64) * Hkv + h
        store_state(final_S_ptr, final_z_ptr, n, S, z, mask_S, offs_d, offs_dv, D, M, tl.float32)
