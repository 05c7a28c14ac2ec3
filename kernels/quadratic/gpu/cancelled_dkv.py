"""A tile of keys, backward: what cancelled queries (chunk_output.py) of later chunks add to dk and dv."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from linattn.kernels.common.gpu.launch import launch, strides_bht
from linattn.kernels.common.gpu.mainloop import accumulate_dkv
from linattn.kernels.common.gpu.numerics import precision, round_to
from linattn.kernels.quadratic.gpu import bwd_preprocess
from linattn.kernels.quadratic.gpu.chunk_dkv import load_key_tile, score_queries
from linattn.kernels.quadratic.gpu.chunk_schedule import locate_key_tile, token_ptr

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.gpu.bwd_preprocess import QueryGrads
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem

TILES_AT_ONCE = tl.constexpr(1024)
"""Tiles of queries that are looked through together for a cancelled query."""


@triton.jit
def add_gradient(ptr, x, mask_n, stride, SIZE, IN_DTYPE: tl.constexpr):
    """Add to a gradient that is stored already."""
    offs_n, offs_d = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    mask = mask_n[:, None] & (offs_d < SIZE)
    before = tl.load(ptr + offs_n * stride + offs_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr + offs_n * stride + offs_d, round_to(before + x, IN_DTYPE), mask=mask)


@triton.jit
def next_cancelled(cancelled_tiles_ptr, tile, num_tiles):
    """Find the first tile from `tile` on with a cancelled query; `num_tiles` if there is none."""
    found = num_tiles
    while (tile < num_tiles) & (found == num_tiles):
        tiles = tile + tl.arange(0, TILES_AT_ONCE)
        cancelled = tl.load(cancelled_tiles_ptr + tiles, mask=tiles < num_tiles, other=0)
        found = tl.min(tl.where(cancelled != 0, tiles, num_tiles), 0)
        tile += TILES_AT_ONCE
    return found


@triton.jit
def cancelled_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    dout_ptr,
    cancelled_norm_ptr,
    delta_ptr,
    cancelled_tiles_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    first_position_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
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
    num_query_tiles,
    num_boundaries,
    a,
    b,
    c,
    slope,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SIMILARITY: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    EVEN: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
):
    """Accumulate dk += sum_i ds_i q_i and dv += sum_i p_i dO_i over cancelled queries i of later chunks: their norm is
    not 0 in `cancelled_norm`, and their tiles of BLOCK_T queries are marked. Where there are none, this ends at once.
    """
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature.
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, first_key, boundary, last, slot = locate_key_tile(
        cu_seqlens_ptr, NUM_SEQS, T, Tk, CHUNK, num_tiles, num_boundaries, BLOCK_N, CAUSAL, PACKED
    )
    if first_key >= Tk:
        return
    k_ptr = token_ptr(k_ptr, batch, h, start + first_key, stride_k)
    v_ptr = token_ptr(v_ptr, batch, h, start + first_key, stride_v)
    if KEY_MASK:
        key_mask_ptr += batch * stride_mb + start
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
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    _, stop = score_queries(first_key, boundary, last, slot, first_position_ptr, q_offset, T, CHUNK, CAUSAL, HAS_TABLES)
    first_tile, end_tile = ((start + stop) // BLOCK_T).to(tl.int32), tl.cdiv(start + T, BLOCK_T).to(tl.int32)
    found = False
    for member in range(GROUP):
        head = batch * Hkv * GROUP + h * GROUP + member
        offset_l = head * T_all + start
        q_head = token_ptr(q_ptr, batch, h * GROUP + member, start, stride_q)
        dout_head = token_ptr(dout_ptr, batch, h * GROUP + member, start, stride_do)
        tile = next_cancelled(cancelled_tiles_ptr + head * num_query_tiles, first_tile, end_tile)
        while tile < end_tile:
            query_0 = tl.maximum((tile * BLOCK_T - start).to(tl.int32), stop)
            dk, dv = accumulate_dkv(
                dk,
                dv,
                k,
                v,
                keys,
                q_head,
                dout_head,
                cancelled_norm_ptr + offset_l,
                delta_ptr + offset_l,
                query_0,
                query_0 + BLOCK_T,
                tl.minimum(((tile + 1) * BLOCK_T - start).to(tl.int32), T),
                q_offset,
                stride_q[2],
                stride_do[2],
                D,
                M,
                a,
                b,
                c,
                SIMILARITY=SIMILARITY,
                MASKED=False,
                RAGGED=True,
                NORMALIZE=True,
                NEEDS_DK=NEEDS_DK,
                NEEDS_DV=NEEDS_DV,
                EVEN_D=EVEN,
                EVEN_DV=EVEN,
                IN_DTYPE=IN_DTYPE,
                PRECISION=PRECISION,
                BLOCK_T=BLOCK_T,
                BLOCK_D=BLOCK_D,
                BLOCK_DV=BLOCK_DV,
            )
            found = True
            tile = next_cancelled(cancelled_tiles_ptr + head * num_query_tiles, tile + 1, end_tile)
    if found:
        if NEEDS_DK:
            dk_ptr = token_ptr(dk_ptr, batch, h, start + first_key, stride_dk)
            add_gradient(dk_ptr, dk * slope, mask_n, stride_dk[2], D, IN_DTYPE)
        if NEEDS_DV:
            dv_ptr = token_ptr(dv_ptr, batch, h, start + first_key, stride_dv)
            add_gradient(dv_ptr, dv, mask_n, stride_dv[2], M, IN_DTYPE)


def launch_cancelled_dkv(
    problem: ChunkedProblem, grads: QueryGrads, dk: Tensor, dv: Tensor, needs_dk: bool, needs_dv: bool
) -> None:
    """Add what cancelled queries of later chunks contribute to dk and dv, by the tiles of bwd_preprocess.py."""
    tile = problem.tiles.cancelled
    num_tiles = triton.cdiv(problem.k.shape[2], tile.BLOCK_T)
    query_tile = bwd_preprocess.TILE.BLOCK_T
    launch(
        cancelled_dkv_kernel,
        (problem.num_programs(num_tiles, tile.BLOCK_T), problem.kv_heads),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        BLOCK_T=query_tile,
        BLOCK_N=tile.BLOCK_T,
        **problem.schedule_args(),
        **problem.first_position_args(),
        **problem.size_args(),
        **problem.qkv_args(),
        **problem.similarity_args(),
        dout_ptr=grads.dout,
        stride_do=strides_bht(grads.dout),
        cancelled_norm_ptr=grads.cancelled_norm,
        delta_ptr=grads.delta,
        cancelled_tiles_ptr=grads.cancelled_tiles,
        dk_ptr=dk,
        stride_dk=strides_bht(dk),
        dv_ptr=dv,
        stride_dv=strides_bht(dv),
        NUM_SEQS=problem.num_seqs,
        Hkv=problem.kv_heads,
        q_offset=problem.options.q_offset,
        num_tiles=num_tiles,
        num_query_tiles=triton.cdiv(problem.q.shape[2], query_tile),
        slope=problem.similarity.slope,
        PRECISION=precision(problem.q.dtype),
        NEEDS_DK=needs_dk,
        NEEDS_DV=needs_dv,
    )
