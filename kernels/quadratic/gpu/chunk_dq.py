"""A tile of queries, backward: dq from the state at its boundary and from the scores of its chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from linattn.kernels.common.gpu.launch import launch, strides_bht
from linattn.kernels.common.gpu.mainloop import accumulate_dq, load_tile
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.quadratic.gpu.chunk_schedule import (
    chunk_key_range,
    clamp_to_sequence,
    locate_query_tile,
    state_boundary,
    state_offsets,
    token_ptr,
)
from linattn.kernels.quadratic.gpu.inter_chunk import accumulate_moments_gradient, accumulate_products_gradient

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.gpu.bwd_preprocess import QueryGrads
    from linattn.kernels.quadratic.gpu.chunk_state import ChunkState
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem


@triton.jit
def chunk_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    dout_ptr,
    cancelled_ptr,
    dout_scaled_ptr,
    norm_ptr,
    delta_ptr,
    delta_scaled_ptr,
    dq_ptr,
    products_ptr,
    moments_ptr,
    cu_seqlens_ptr,
    state_boundary_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dq,
    stride_mb,
    NUM_SEQS,
    T,
    Tk,
    H,
    D,
    M,
    q_offset,
    position_0,
    CHUNK,
    num_tiles,
    num_boundaries,
    moments_size,
    a,
    b,
    c,
    slope,
    weight_1,
    weight_2,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDTH: tl.constexpr,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    CHECK_CANCELLATION: tl.constexpr,
    EVEN: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
):
    """Compute dq = d/dq [phi(q) S . (dO / l) - delta_scaled l(q)] + sum_j ds_j k_j, j over the keys after S. A tile
    with cancelled queries computes all scores, as it did in `chunk_output_kernel`.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps dq in registers from the state to the last key.
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, position, last, slot = locate_query_tile(
        cu_seqlens_ptr, NUM_SEQS, T, Tk, position_0, CHUNK, num_tiles, num_boundaries, BLOCK_T, CAUSAL, PACKED
    )
    query_0 = position - q_offset
    if (query_0 >= T) | (T == 0):  # nothing here, not even a query to load in place of one that is not
        return
    q_ptr = token_ptr(q_ptr, batch, h, start + query_0, stride_q)
    k_ptr = token_ptr(k_ptr, batch, h // GROUP, start, stride_k)
    v_ptr = token_ptr(v_ptr, batch, h // GROUP, start, stride_v)
    dout_ptr = token_ptr(dout_ptr, batch, h, start + query_0, stride_do)
    dq_ptr = token_ptr(dq_ptr, batch, h, start + query_0, stride_dq)
    offset_l = (batch * H + h) * T_all + start + query_0
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_t = (query_0 + offs_t >= 0) & (query_0 + offs_t < T)
    boundary = state_boundary(position, last, slot, state_boundary_ptr, CHUNK, CAUSAL, HAS_TABLES)
    if CHECK_CANCELLATION:
        cancelled = tl.load(cancelled_ptr + offset_l + offs_t, mask=mask_t, other=0)
        boundary = tl.where(tl.max(cancelled.to(tl.int32), 0) > 0, 0, boundary)
    products, moments = state_offsets(slot + boundary, h // GROUP, H // GROUP, BLOCK_D, BLOCK_DV, moments_size)
    # The state comes first, as in chunk_output.py.
    q = load_tile(q_ptr, 0, stride_q[2], mask_t, offs_t, offs_d, D, True, EVEN)
    offs = clamp_to_sequence(offs_t, query_0, T)[:, None]
    q_tile, dout_scaled_tile = q_ptr + offs * stride_q[2], dout_scaled_ptr + offset_l * M + offs * M
    dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dq = accumulate_products_gradient(
        dq,
        q_tile,
        dout_scaled_tile,
        products_ptr + products,
        D,
        M,
        BLOCK_D,
        BLOCK_DV,
        WIDTH,
        EVEN,
        STATE_DTYPE,
        PRECISION,
    )
    delta = tl.zeros([BLOCK_T], tl.float32)
    if NORMALIZE:
        delta = tl.load(delta_scaled_ptr + offset_l + offs_t, mask=mask_t, other=0.0)
    dq = accumulate_moments_gradient(
        dq,
        q_tile,
        dout_scaled_tile,
        -delta,
        moments_ptr + moments,
        D,
        M,
        weight_1,
        weight_2,
        BLOCK_D=BLOCK_D,
        BLOCK_DV=BLOCK_DV,
        EVEN=EVEN,
        ROW_SUM=NORMALIZE,
        STATE_DTYPE=STATE_DTYPE,
        PRECISION=PRECISION,
        GRAM_PRECISION=GRAM_PRECISION,
    )
    dq /= slope  # score tiles leave their slope to the end
    dout = load_tile(dout_ptr, 0, stride_do[2], mask_t, offs_t, offs_dv, M, True, EVEN)
    norm, delta = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    if NORMALIZE:
        norm = tl.load(norm_ptr + offset_l + offs_t, mask=mask_t, other=0.0)
        delta = tl.load(delta_ptr + offset_l + offs_t, mask=mask_t, other=0.0)
    begin, full, stop = chunk_key_range(position, boundary, Tk, CHUNK, CAUSAL, KEY_MASK, BLOCK_T, BLOCK_N)
    for MASKED in tl.static_range(2):
        dq = accumulate_dq(
            dq,
            q,
            dout,
            norm,
            delta,
            k_ptr,
            v_ptr,
            key_mask_ptr,
            full if MASKED else begin,
            stop if MASKED else full,
            Tk,
            position + offs_t,
            stride_k[2],
            stride_v[2],
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
            EVEN_D=EVEN,
            EVEN_DV=EVEN,
            IN_DTYPE=IN_DTYPE,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
        )
    dq *= slope
    dq_tile = dq_ptr + offs_t[:, None] * stride_dq[2] + offs_d[None, :]
    tl.store(dq_tile, round_to(dq, IN_DTYPE), mask=mask_t[:, None] & (offs_d < D)[None, :])


def launch_dq(problem: ChunkedProblem, state: ChunkState, grads: QueryGrads, dq: Tensor) -> None:
    """Fill dq from the state over keys."""
    tile = problem.tiles.dq
    position_0, num_tiles = problem.query_tiles(tile.BLOCK_T)
    _, weight_1, weight_2 = problem.weights
    launch(
        chunk_dq_kernel,
        (problem.num_programs(num_tiles, tile.BLOCK_T), problem.q.shape[1]),
        **problem.inter_chunk_args(tile),
        **problem.schedule_args(),
        **problem.state_boundary_args(),
        **problem.size_args(),
        **problem.qkv_args(),
        **problem.similarity_args(),
        dout_ptr=grads.dout,
        stride_do=strides_bht(grads.dout),
        cancelled_ptr=grads.cancelled,
        dout_scaled_ptr=grads.dout_scaled,
        norm_ptr=grads.norm,
        delta_ptr=grads.delta,
        delta_scaled_ptr=grads.delta_scaled,
        dq_ptr=dq,
        stride_dq=strides_bht(dq),
        products_ptr=state.products,
        moments_ptr=state.moments,
        NUM_SEQS=problem.num_seqs,
        H=problem.q.shape[1],
        q_offset=problem.options.q_offset,
        position_0=position_0,
        num_tiles=num_tiles,
        slope=problem.similarity.slope,
        weight_1=weight_1,
        weight_2=weight_2,
        NORMALIZE=problem.options.normalize,
        CHECK_CANCELLATION=problem.check_cancellation,
    )
