"""Prepare what the backward pass knows of each query before it sums anything: 1/l, delta, and dO / l for the states."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.kernels.common.gpu.launch import launch, strides_bht
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, round_to
from linattn.kernels.quadratic.gpu import config
from linattn.kernels.quadratic.gpu.chunk_schedule import token_ptr
from linattn.kernels.quadratic.gpu.kernel_args import STATE_DTYPE

if TYPE_CHECKING:
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem
    from linattn.kernels.quadratic.gpu.workspace import HeadGroup

TILE = config.StateTile(32, 4, 2)


class QueryGrads(NamedTuple):
    """dout, and what `bwd_preprocess_kernel` makes of it."""

    dout: Tensor
    dout_scaled: Tensor
    norm: Tensor
    delta: Tensor
    delta_scaled: Tensor
    cancelled: Tensor | None
    cancelled_norm: Tensor | None
    cancelled_tiles: Tensor | None

    def of(self, group: HeadGroup) -> QueryGrads:
        """Return what belongs to a group of heads."""
        return QueryGrads._make(group.of(x) for x in self)


@triton.jit
def bwd_preprocess_kernel(
    o_ptr,
    dout_ptr,
    l_ptr,
    cancelled_ptr,
    dout_scaled_ptr,
    norm_ptr,
    delta_ptr,
    delta_scaled_ptr,
    cancelled_norm_ptr,
    cancelled_tiles_ptr,
    stride_o,
    stride_do,
    T,
    H,
    M,
    BLOCK_T: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHECK_CANCELLATION: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
):
    """Compute norm = 1/l, delta = dO.o, and for the states dO / l, rounded, with delta_scaled = (dO / l).o of just
    these rounded numbers. All are 0 for a query without a sum (l <= 0). A cancelled query adds nothing to the states:
    its norm is stored apart, and which tiles have such queries.
    """
    # Over 60 lines: the signature.
    tile, h, batch = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    offs_t, offs_dv, first = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_DV), tl.cast(tile * BLOCK_T, tl.int64)
    mask_t = first + offs_t < T
    mask = mask_t[:, None] & (offs_dv < M)[None, :]
    dout_ptr = token_ptr(dout_ptr, batch, h, first, stride_do)
    dout = tl.load(dout_ptr + offs_t[:, None] * stride_do[2] + offs_dv[None, :], mask=mask, other=0.0).to(tl.float32)
    queries = (batch * H + h) * T + first + offs_t
    if NORMALIZE:
        o_ptr = token_ptr(o_ptr, batch, h, first, stride_o)
        o = tl.load(o_ptr + offs_t[:, None] * stride_o[2] + offs_dv[None, :], mask=mask, other=0.0).to(tl.float32)
        l = tl.load(l_ptr + queries, mask=mask_t, other=0.0)
        norm = 1.0 / tl.where(l <= 0, float("inf"), l)
        tl.store(norm_ptr + queries, norm, mask=mask_t)
        tl.store(delta_ptr + queries, tl.sum(dout * o, 1), mask=mask_t)
        if CHECK_CANCELLATION:
            cancelled = tl.load(cancelled_ptr + queries, mask=mask_t, other=0) != 0
            tl.store(cancelled_norm_ptr + queries, tl.where(cancelled, norm, 0.0), mask=mask_t)
            of_tile = (batch * H + h) * tl.num_programs(0) + tile
            tl.store(cancelled_tiles_ptr + of_tile, tl.max(cancelled.to(tl.int32), 0).to(tl.uint8))
            norm = tl.where(cancelled, 0.0, norm)
        dout_scaled = round_to(dout * norm[:, None], STATE_DTYPE)
        tl.store(delta_scaled_ptr + queries, tl.sum(dout_scaled.to(tl.float32) * o, 1), mask=mask_t)
    else:
        dout_scaled = round_to(dout, STATE_DTYPE)
    tl.store(dout_scaled_ptr + queries[:, None] * M + offs_dv[None, :], dout_scaled, mask=mask)


def bwd_preprocess(
    problem: ChunkedProblem, dout: Tensor, out: Tensor, l: Tensor, cancelled: Tensor | None
) -> QueryGrads:
    """Make what the states and the score tiles of the backward pass need of every query."""
    B, H, T, M = out.shape
    normalize, num_tiles = problem.options.normalize, triton.cdiv(T, TILE.BLOCK_T)
    norm, delta, delta_scaled = (torch.empty_like(l) if normalize else l.new_empty(0) for _ in range(3))
    grads = QueryGrads(
        dout=dout,
        dout_scaled=out.new_empty(out.shape, dtype=STATE_DTYPE[out.dtype]),
        norm=norm,
        delta=delta,
        delta_scaled=delta_scaled,
        cancelled=cancelled,
        cancelled_norm=None if cancelled is None else torch.empty_like(l),
        cancelled_tiles=None if cancelled is None else cancelled.new_empty(B, H, num_tiles),
    )
    launch(
        bwd_preprocess_kernel,
        (num_tiles, H, B),
        num_warps=TILE.num_warps,
        num_stages=TILE.num_stages,
        o_ptr=out,
        stride_o=strides_bht(out),
        dout_ptr=dout,
        stride_do=strides_bht(dout),
        l_ptr=l,
        cancelled_ptr=cancelled,
        dout_scaled_ptr=grads.dout_scaled,
        norm_ptr=norm,
        delta_ptr=delta,
        delta_scaled_ptr=delta_scaled,
        cancelled_norm_ptr=grads.cancelled_norm,
        cancelled_tiles_ptr=grads.cancelled_tiles,
        T=T,
        H=H,
        M=M,
        BLOCK_T=TILE.BLOCK_T,
        BLOCK_DV=problem.block_dv,
        NORMALIZE=normalize,
        CHECK_CANCELLATION=problem.check_cancellation,
        STATE_DTYPE=TRITON_DTYPE[STATE_DTYPE[out.dtype]],
    )
    return grads
