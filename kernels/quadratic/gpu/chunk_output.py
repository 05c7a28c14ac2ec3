"""A tile of queries, forward (flash-linear-attention: chunk_o): the state at its boundary and the scores of its chunk.

Where (1 + s)^2 vanishes for nearly all keys, the terms of a state cancel and a query loses its digits. A tile that
holds such a query, one whose sum is `max_cancellation` times smaller than its terms, takes boundary 0 instead, which
has no keys before it, and computes all of its scores. The query is noted as cancelled, for the backward pass
(CHECK_CANCELLATION).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from linattn.kernels.common.gpu.launch import launch, strides_bht
from linattn.kernels.common.gpu.mainloop import accumulate_output, init_accumulators, load_tile, unscale
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.quadratic.gpu import config
from linattn.kernels.quadratic.gpu.chunk_schedule import (
    chunk_key_range,
    clamp_to_sequence,
    locate_query_tile,
    state_boundary,
    state_offsets,
    token_ptr,
)
from linattn.kernels.quadratic.gpu.inter_chunk import accumulate_moments, accumulate_products, inter_row_sum

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.gpu.chunk_state import ChunkState
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem


@triton.jit
def chunk_output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    o_ptr,
    l_ptr,
    cancelled_ptr,
    products_ptr,
    moments_ptr,
    cu_seqlens_ptr,
    state_boundary_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
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
    weight_0,
    weight_1,
    weight_2,
    max_cancellation,
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
    """Compute o = (phi(q) S + sum_j p_j v_j) / l with l = w0 n + w1 q.z + w2 q.Z q + sum_j p_j, j over the keys after
    those in S.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps acc in registers from the state to the last key.
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
    o_ptr = token_ptr(o_ptr, batch, h, start + query_0, stride_o)
    offset_l = (batch * H + h) * T_all + start + query_0
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start

    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_t = (query_0 + offs_t >= 0) & (query_0 + offs_t < T)
    q_tile = q_ptr + clamp_to_sequence(offs_t, query_0, T)[:, None] * stride_q[2]
    boundary = state_boundary(position, last, slot, state_boundary_ptr, CHUNK, CAUSAL, HAS_TABLES)
    products, moments = state_offsets(slot + boundary, h // GROUP, H // GROUP, BLOCK_D, BLOCK_DV, moments_size)
    inter_l, terms = inter_row_sum(
        q_tile, moments_ptr + moments, D, weight_0, weight_1, weight_2, BLOCK_D, BLOCK_DV, EVEN, GRAM_PRECISION
    )
    if CHECK_CANCELLATION:
        cancelled = mask_t & (terms > max_cancellation * inter_l)
        tl.store(cancelled_ptr + offset_l + offs_t, cancelled.to(tl.uint8), mask=mask_t)
        any_cancelled = tl.max(cancelled.to(tl.int32), 0)
        boundary = tl.where(any_cancelled > 0, 0, boundary)
        inter_l = tl.where(any_cancelled > 0, 0.0, inter_l)
        products, moments = state_offsets(slot + boundary, h // GROUP, H // GROUP, BLOCK_D, BLOCK_DV, moments_size)
    # The state comes first: after loops over scores, Triton 3.6 has every product of this loop wait for the one before.
    inter = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    inter = accumulate_products(
        inter, q_tile, products_ptr + products, D, BLOCK_D, BLOCK_DV, WIDTH, EVEN, STATE_DTYPE, PRECISION
    )
    inter = accumulate_moments(
        inter, q_tile, moments_ptr + moments, D, weight_0, weight_1, BLOCK_D, BLOCK_DV, EVEN, STATE_DTYPE, PRECISION
    )
    acc, l, m = init_accumulators(BLOCK_T, BLOCK_DV, SIMILARITY)
    if tl.float16 != IN_DTYPE:  # weights of fp16 are summed on a scale of their own
        acc, l = inter, inter_l
    q = load_tile(q_ptr, 0, stride_q[2], mask_t, offs_t, offs_d, D, True, EVEN)
    begin, full, stop = chunk_key_range(position, boundary, Tk, CHUNK, CAUSAL, KEY_MASK, BLOCK_T, BLOCK_N)
    for MASKED in tl.static_range(2):
        acc, l, m = accumulate_output(
            acc,
            l,
            m,
            q,
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
            EVEN_D=EVEN,
            EVEN_DV=EVEN,
            IN_DTYPE=IN_DTYPE,
            PRECISION=PRECISION,
            BLOCK_N=BLOCK_N,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
        )
    acc, l = unscale(acc, l, m, SIMILARITY, IN_DTYPE)
    if tl.float16 == IN_DTYPE:
        acc, l = acc + inter, l + inter_l
    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)[:, None]
    o_tile = o_ptr + offs_t[:, None] * stride_o[2] + offs_dv[None, :]
    tl.store(o_tile, round_to(acc, IN_DTYPE), mask=mask_t[:, None] & (offs_dv < M)[None, :])
    tl.store(l_ptr + offset_l + offs_t, l, mask=mask_t)


def launch_output(problem: ChunkedProblem, state: ChunkState, out: Tensor, l: Tensor, cancelled: Tensor | None) -> None:
    """Fill out, l and, if there are any to look for, which queries are cancelled."""
    tile = problem.tiles.output
    position_0, num_tiles = problem.query_tiles(tile.BLOCK_T)
    weight_0, weight_1, weight_2 = problem.weights
    launch(
        chunk_output_kernel,
        (problem.num_programs(num_tiles, tile.BLOCK_T), problem.q.shape[1]),
        **problem.inter_chunk_args(tile),
        **problem.schedule_args(),
        **problem.state_boundary_args(),
        **problem.size_args(),
        **problem.qkv_args(),
        **problem.similarity_args(),
        o_ptr=out,
        stride_o=strides_bht(out),
        l_ptr=l,
        cancelled_ptr=cancelled,
        products_ptr=state.products,
        moments_ptr=state.moments,
        NUM_SEQS=problem.num_seqs,
        H=problem.q.shape[1],
        q_offset=problem.options.q_offset,
        position_0=position_0,
        num_tiles=num_tiles,
        weight_0=weight_0,
        weight_1=weight_1,
        weight_2=weight_2,
        max_cancellation=config.MAX_CANCELLATION[problem.q.dtype],
        NORMALIZE=problem.options.normalize,
        CHECK_CANCELLATION=problem.check_cancellation,
    )
