"""A tile of keys, backward: dk or dv from the state over later queries at the boundary after it, and from the queries
that computed its scores; from queries that are cancelled, in cancelled_dkv.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from linattn.kernels.common.gpu.launch import launch, strides_bht
from linattn.kernels.common.gpu.mainloop import accumulate_dkv, load_key_mask, load_tile
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.quadratic.gpu.chunk_schedule import (
    clamp_to_sequence,
    first_position,
    locate_key_tile,
    queries_between,
    state_offsets,
    token_ptr,
)
from linattn.kernels.quadratic.gpu.inter_chunk import (
    accumulate_moments,
    accumulate_moments_gradient,
    accumulate_products,
    accumulate_products_gradient,
)

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.gpu.bwd_preprocess import QueryGrads
    from linattn.kernels.quadratic.gpu.chunk_state import ChunkState
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem


@triton.jit
def inter_dkv(
    k_tile,
    v_tile,
    products_ptr,
    moments_ptr,
    D,
    M,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
    OF_VALUES: tl.constexpr,
):
    """Compute dv = phi(k) S + k (q dO^T) + dO, S summed over later queries, or dk, the gradient to k of that against v,
    without the slope; the other is 0. The state carries all weights.
    """
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if OF_VALUES:
        dv = accumulate_products(dv, k_tile, products_ptr, D, BLOCK_D, BLOCK_DV, WIDTH, EVEN, STATE_DTYPE, PRECISION)
        dv = accumulate_moments(dv, k_tile, moments_ptr, D, 1.0, 1.0, BLOCK_D, BLOCK_DV, EVEN, STATE_DTYPE, PRECISION)
    else:
        dk = accumulate_products_gradient(
            dk, k_tile, v_tile, products_ptr, D, M, BLOCK_D, BLOCK_DV, WIDTH, EVEN, STATE_DTYPE, PRECISION
        )
        dk = accumulate_moments_gradient(
            dk,
            k_tile,
            v_tile,
            tl.full([BLOCK_N], 1.0, tl.float32),
            moments_ptr,
            D,
            M,
            1.0,
            1.0,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
            EVEN=EVEN,
            ROW_SUM=True,
            STATE_DTYPE=STATE_DTYPE,
            PRECISION=PRECISION,
            GRAM_PRECISION=GRAM_PRECISION,
        )
        dk /= slope
    return dk, dv


@triton.jit
def load_key_tile(
    k_ptr,
    v_ptr,
    key_mask_ptr,
    first_key,
    Tk,
    stride_kt,
    stride_vt,
    D,
    M,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KEY_MASK: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return the keys of a tile, which of them count, and k and v of these."""
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = first_key + offs_n
    mask_n = load_key_mask(key_mask_ptr, keys, Tk, KEY_MASK)
    k = load_tile(k_ptr, 0, stride_kt, mask_n, offs_n, offs_d, D, True, EVEN)
    v = load_tile(v_ptr, 0, stride_vt, mask_n, offs_n, offs_dv, M, True, EVEN)
    return keys, mask_n, k, v


@triton.jit
def score_queries(
    first_key,
    boundary,
    last,
    slot,
    first_position_ptr,
    q_offset,
    T,
    CHUNK,
    CAUSAL: tl.constexpr,
    HAS_TABLES: tl.constexpr,
):
    """Return the queries [begin, stop) that computed the scores of a tile of keys; later ones used the state."""
    end = first_position(boundary, last, slot, first_position_ptr, CHUNK, CAUSAL, HAS_TABLES)
    return queries_between(first_key if CAUSAL else 0, end, q_offset, T, CAUSAL)


@triton.jit
def chunk_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    dkv_ptr,
    products_ptr,
    moments_ptr,
    cu_seqlens_ptr,
    first_position_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dkv,
    stride_mb,
    NUM_SEQS,
    T,
    Tk,
    Hkv,
    D,
    M,
    q_offset,
    CHUNK,
    num_tiles,
    num_boundaries,
    moments_size,
    a,
    b,
    c,
    slope,
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
    EVEN: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
    OF_VALUES: tl.constexpr,
):
    """Compute dv = phi(k) S + sum_i p_i dO_i (OF_VALUES), or dk = d/dk [phi(k) S . v] + sum_i ds_i q_i, S summed over
    later queries, i over the queries before those.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature. One program keeps dk or dv in registers from the state to the last query.
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, first_key, boundary, last, slot = locate_key_tile(
        cu_seqlens_ptr, NUM_SEQS, T, Tk, CHUNK, num_tiles, num_boundaries, BLOCK_N, CAUSAL, PACKED
    )
    if first_key >= Tk:
        return
    k_ptr = token_ptr(k_ptr, batch, h, start + first_key, stride_k)
    v_ptr = token_ptr(v_ptr, batch, h, start + first_key, stride_v)
    q_ptr = token_ptr(q_ptr, batch, h * GROUP, start, stride_q)
    dout_ptr = token_ptr(dout_ptr, batch, h * GROUP, start, stride_do)
    dkv_ptr = token_ptr(dkv_ptr, batch, h, start + first_key, stride_dkv)
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start
    offset_l = (batch * Hkv + h) * GROUP * T_all + start
    products, moments = state_offsets(slot, h, Hkv, BLOCK_D, BLOCK_DV, moments_size)
    keys, mask_n, k, v = load_key_tile(
        k_ptr,
        v_ptr,
        key_mask_ptr,
        first_key,
        Tk,
        stride_k[2],
        stride_v[2],
        D,
        M,
        BLOCK_N,
        BLOCK_D,
        BLOCK_DV,
        KEY_MASK,
        EVEN,
    )
    # The state comes first: after loops over scores, Triton 3.6 has every product of this loop wait for the one before.
    offs = clamp_to_sequence(tl.arange(0, BLOCK_N), first_key, Tk)[:, None]
    dk, dv = inter_dkv(
        k_ptr + offs * stride_k[2],
        v_ptr + offs * stride_v[2],
        products_ptr + products,
        moments_ptr + moments,
        D,
        M,
        slope,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        BLOCK_DV=BLOCK_DV,
        WIDTH=WIDTH,
        EVEN=EVEN,
        STATE_DTYPE=STATE_DTYPE,
        PRECISION=PRECISION,
        GRAM_PRECISION=GRAM_PRECISION,
        OF_VALUES=OF_VALUES,
    )
    begin, stop = score_queries(
        first_key, boundary, last, slot, first_position_ptr, q_offset, T, CHUNK, CAUSAL, HAS_TABLES
    )
    # Tiles of queries on the diagonal, then those that see all of these keys. If the compiler took it that a loop may
    # take no step, every matrix product would wait (ptxas: wgmma serialized): each takes one, if on queries that do not
    # count.
    full = begin
    if CAUSAL:
        diagonal = tl.maximum(first_key + BLOCK_N - 1 - q_offset - begin, 0)
        full = tl.minimum(begin + tl.cdiv(diagonal, BLOCK_T) * BLOCK_T, stop)
    to_full, to_stop = tl.maximum(full, begin + 1), tl.maximum(stop, full + 1)
    tl.assume(to_full > begin)
    tl.assume(to_stop > full)
    for _ in tl.static_range(GROUP):
        for DIAGONAL in tl.static_range(1, -1, -1):
            if CAUSAL or not DIAGONAL:
                dk, dv = accumulate_dkv(
                    dk,
                    dv,
                    k,
                    v,
                    keys,
                    q_ptr,
                    dout_ptr,
                    norm_ptr + offset_l,
                    delta_ptr + offset_l,
                    begin if DIAGONAL else full,
                    to_full if DIAGONAL else to_stop,
                    full if DIAGONAL else stop,
                    q_offset,
                    stride_q[2],
                    stride_do[2],
                    D,
                    M,
                    a,
                    b,
                    c,
                    SIMILARITY=SIMILARITY,
                    MASKED=DIAGONAL,
                    RAGGED=True,
                    NORMALIZE=NORMALIZE,
                    NEEDS_DK=not OF_VALUES,
                    NEEDS_DV=OF_VALUES,
                    EVEN_D=EVEN,
                    EVEN_DV=EVEN,
                    IN_DTYPE=IN_DTYPE,
                    PRECISION=PRECISION,
                    BLOCK_T=BLOCK_T,
                    BLOCK_D=BLOCK_D,
                    BLOCK_DV=BLOCK_DV,
                )
        q_ptr += stride_q[1]
        dout_ptr += stride_do[1]
        offset_l += T_all
    if OF_VALUES:
        store_gradient(dkv_ptr, dv, mask_n, keys < Tk, stride_dkv[2], M, IN_DTYPE)
    else:
        store_gradient(dkv_ptr, dk * slope, mask_n, keys < Tk, stride_dkv[2], D, IN_DTYPE)


@triton.jit
def store_gradient(ptr, x, mask_n, exists, stride, SIZE, IN_DTYPE: tl.constexpr):
    """Store the gradient to a tile of keys, 0 for keys that do not count."""
    offs_n, offs_d = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    x = round_to(tl.where(mask_n[:, None], x, 0.0), IN_DTYPE)
    tl.store(ptr + offs_n * stride + offs_d, x, mask=exists[:, None] & (offs_d < SIZE))


def launch_dkv(
    problem: ChunkedProblem, state: ChunkState, grads: QueryGrads, gradient: Tensor, of_values: bool
) -> None:
    """Fill dk, or dv if `of_values`, from the state over queries."""
    tile = problem.tiles.dv if of_values else problem.tiles.dk
    num_tiles = triton.cdiv(problem.k.shape[2], tile.BLOCK_N)
    launch(
        chunk_dkv_kernel,
        (problem.num_programs(num_tiles, tile.BLOCK_N), problem.kv_heads),
        **problem.inter_chunk_args(tile),
        **problem.schedule_args(),
        **problem.first_position_args(),
        **problem.size_args(),
        **problem.qkv_args(),
        **problem.similarity_args(),
        dout_ptr=grads.dout,
        stride_do=strides_bht(grads.dout),
        norm_ptr=grads.norm,
        delta_ptr=grads.delta,
        dkv_ptr=gradient,
        stride_dkv=strides_bht(gradient),
        products_ptr=state.products,
        moments_ptr=state.moments,
        NUM_SEQS=problem.num_seqs,
        Hkv=problem.kv_heads,
        q_offset=problem.options.q_offset,
        num_tiles=num_tiles,
        slope=problem.similarity.slope,
        NORMALIZE=problem.options.normalize,
        OF_VALUES=of_values,
    )
