"""The state at every boundary of chunks (flash-linear-attention: chunk_h), over keys, or over queries for the gradients
to it.

    products    sum x_i x_j y^T        blocks of 16 x 16 features [A, B <= A], each [256, M]; times 2 c2 scale^2
    moments     sum f x x^T, f x, x y^T, y, f    everything of degree 1 and 0 and the Gram matrix of the row sum, fp32

Forward x, y = k, v, f = 1, and a boundary counts the chunks before it. Reverse x, y = q, dO / l, f = -delta, and a
boundary counts the queries that multiply with its state or a later one: the gradient to each key before the boundary.
Sums are first taken over runs of a few chunks, each in one program, then chunk_state_scan.py adds what lies before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.kernels.common.gpu.launch import launch, strides_bht
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, dot, precision, round_to
from linattn.kernels.common.gpu.varlen_schedule import bounds_of
from linattn.kernels.quadratic.gpu import state_layout
from linattn.kernels.quadratic.gpu.chunk_schedule import (
    last_boundary,
    locate_tile,
    slot_of,
    tokens_of_boundary,
)
from linattn.kernels.quadratic.gpu.chunk_state_scan import RunSums, ScanEnds, launch_scan
from linattn.kernels.quadratic.gpu.inter_chunk import SLICE, multiply
from linattn.kernels.quadratic.gpu.kernel_args import STATE_DTYPE, gram_precision

if TYPE_CHECKING:
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem
    from linattn.kernels.quadratic.gpu.state_layout import State

FEATURES = tl.constexpr(256)
"""Features of one block."""


class ChunkState(NamedTuple):
    """The state at boundaries `[slots, Hkv, ...]`; and, if asked for, products and moments after all keys (in reverse:
    before all queries) `[sequences, Hkv, ...]`.
    """

    products: Tensor
    moments: Tensor
    final: tuple[Tensor, Tensor] | None


class _Tokens(NamedTuple):
    """Hold what a state sums over: f (1 if None), x and y, and whether from the end."""

    x: Tensor
    y: Tensor
    f: Tensor | None
    reverse: bool


@triton.jit
def block_of(index, BLOCK_D: tl.constexpr):
    """Return rows A and columns B <= A of block number A (A + 1) / 2 + B."""
    A = index * 0
    for row in tl.static_range(1, BLOCK_D // 16):
        A += (index >= row * (row + 1) // 2).to(tl.int32)
    return A, index - A * (A + 1) // 2


@triton.jit
def load_slice(tile, columns, size, mask_t, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Load some columns of a tile of tokens, 0 where not `mask_t`."""
    if MASKED and EVEN:
        return tl.load(tile + columns[None, :], mask=mask_t[:, None], other=0.0)
    if MASKED:
        return tl.load(tile + columns[None, :], mask=mask_t[:, None] & (columns < size)[None, :], other=0.0)
    if EVEN:
        return tl.load(tile + columns[None, :])
    return tl.load(tile + columns[None, :], mask=(columns < size)[None, :], other=0.0)


@triton.jit
def chunk_products_kernel(
    x_ptr,
    y_ptr,
    key_mask_ptr,
    products_ptr,
    totals_ptr,
    cu_seqlens_ptr,
    first_position_ptr,
    stride_x,
    stride_y,
    stride_mb,
    NUM_SEQS,
    T,
    Tk,
    Hkv,
    D,
    M,
    q_offset,
    CHUNK,
    RUN,
    num_runs,
    num_boundaries,
    weight,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    KEEP_TOTALS: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_T: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute S = sum_t x_ti x_tj y_t, one block of features over one run of RUN tokens. Causal: a run is some chunks
    (in reverse, boundaries), and the sum so far is stored at each. The sum of the whole run goes to `totals`. EVEN_T:
    all tokens of all tiles count.
    """
    # Over 60 lines: half of them are the signature; acc stays in registers from the first chunk to the last.
    block, h = tl.program_id(0), tl.program_id(2)
    NUM_BLOCKS: tl.constexpr = BLOCK_D // 16 * (BLOCK_D // 16 + 1) // 2
    sequence, run = locate_tile(tl.program_id(1), cu_seqlens_ptr, NUM_SEQS, RUN, num_runs, PACKED)
    start, T = bounds_of(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    last = last_boundary(Tk, CHUNK, CAUSAL)
    slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, num_boundaries, CAUSAL, PACKED)
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    stride_xb, stride_xh, stride_xt = stride_x
    stride_yb, stride_yh, stride_yt = stride_y
    x_ptr += batch * stride_xb + tl.cast(h * GROUP, tl.int64) * stride_xh
    y_ptr += batch * stride_yb + tl.cast(h * GROUP, tl.int64) * stride_yh
    A, B = block_of(block, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    offs_a = A * SLICE + tl.arange(0, SLICE)
    offs_b = B * SLICE + tl.arange(0, SLICE)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs = tl.arange(0, FEATURES)[:, None] * BLOCK_DV + offs_dv[None, :]

    acc = tl.zeros([FEATURES, BLOCK_DV], tl.float32)
    if CAUSAL:
        chunks = RUN // CHUNK
        groups = tl.minimum(chunks, (last + 1 if REVERSE else last) - run * chunks)
        if (not REVERSE) & (run == 0):
            index = (tl.cast(slot, tl.int64) * Hkv + h) * NUM_BLOCKS + block
            tl.store(products_ptr + index * FEATURES * BLOCK_DV + offs, round_to(acc, STATE_DTYPE))
    else:
        groups = 1
    for step in range(groups):
        if CAUSAL:
            boundary = last - run * chunks - step if REVERSE else run * chunks + step + 1
            begin, stop = tokens_of_boundary(
                boundary, last, slot + boundary, first_position_ptr, q_offset, T, CHUNK, REVERSE, CAUSAL, HAS_TABLES
            )
        else:
            boundary = last
            begin, stop = run * RUN, tl.minimum((run + 1) * RUN, T)
        for head in range(GROUP):
            for t in tl.range(begin, stop, BLOCK_T):
                token = tl.cast(start + t, tl.int64)
                mask_t = offs_t < stop - t
                if MASKED:
                    mask_t = mask_t & tl.load(key_mask_ptr + batch * stride_mb + token + offs_t, mask=mask_t, other=0)
                x_tile = x_ptr + token * stride_xt + tl.cast(head, tl.int64) * stride_xh + offs_t[:, None] * stride_xt
                y_tile = y_ptr + token * stride_yt + tl.cast(head, tl.int64) * stride_yh + offs_t[:, None] * stride_yt
                xa = load_slice(x_tile, offs_a, D, mask_t, not EVEN_T, EVEN)
                xb = load_slice(x_tile, offs_b, D, mask_t, not EVEN_T, EVEN)
                y = load_slice(y_tile, offs_dv, M, mask_t, not EVEN_T, EVEN)
                phi = multiply(tl.trans(xb)[:, None, :], tl.trans(xa)[None, :, :], STATE_DTYPE)
                # [FEATURES, BLOCK_T] @ [BLOCK_T, BLOCK_DV] -> [FEATURES, BLOCK_DV]
                acc = dot(phi.reshape(FEATURES, BLOCK_T), round_to(y, STATE_DTYPE), acc, PRECISION)
        if CAUSAL:
            index = (tl.cast(slot + boundary, tl.int64) * Hkv + h) * NUM_BLOCKS + block
            tl.store(products_ptr + index * FEATURES * BLOCK_DV + offs, round_to(acc * weight, STATE_DTYPE))
    if KEEP_TOTALS:
        index = (tl.cast(tl.program_id(1), tl.int64) * Hkv + h) * NUM_BLOCKS + block
        tl.store(totals_ptr + index * FEATURES * BLOCK_DV + offs, acc * weight if REVERSE else acc)


@triton.jit
def chunk_moments_kernel(
    x_ptr,
    y_ptr,
    f_ptr,
    key_mask_ptr,
    moments_ptr,
    cu_seqlens_ptr,
    first_position_ptr,
    stride_x,
    stride_y,
    stride_f,
    stride_mb,
    NUM_SEQS,
    T,
    Tk,
    Hkv,
    D,
    M,
    q_offset,
    CHUNK,
    RUN,
    num_runs,
    num_boundaries,
    moments_size,
    weight_0,
    weight_1,
    weight_2,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REVERSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_TABLES: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    EVEN: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
):
    """Compute Z = sum_t f_t x_t x_t^T and the sums of f x, x y^T, y and f over one chunk (causal), stored at its
    boundary, or over RUN tokens, stored by program. Without HAS_FACTOR f = 1 forward, and in reverse, where nothing is
    normalised, f = 0.
    """
    # Over 60 lines: half of them are the signature; the sums stay in registers from the first token to the last.
    h = tl.program_id(1)
    sequence, run = locate_tile(tl.program_id(0), cu_seqlens_ptr, NUM_SEQS, RUN, num_runs, PACKED)
    start, T = bounds_of(sequence, cu_seqlens_ptr, T, PACKED)
    Tk = T if PACKED else Tk
    if CAUSAL:
        last = last_boundary(Tk, CHUNK, CAUSAL)
        slot = slot_of(sequence, cu_seqlens_ptr, CHUNK, num_boundaries, CAUSAL, PACKED) + run
        begin, stop = tokens_of_boundary(
            run, last, slot, first_position_ptr, q_offset, T, CHUNK, REVERSE, CAUSAL, HAS_TABLES
        )
    else:
        begin, stop = run * RUN, tl.minimum((run + 1) * RUN, T)
    batch = tl.cast(0 if PACKED else sequence, tl.int64)
    stride_xb, stride_xh, stride_xt = stride_x
    stride_yb, stride_yh, stride_yt = stride_y
    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    linear = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    x_sum, y_sum, count = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_DV], tl.float32), 0.0
    for head in range(GROUP):
        x_head = x_ptr + batch * stride_xb + tl.cast(h * GROUP + head, tl.int64) * stride_xh
        y_head = y_ptr + batch * stride_yb + tl.cast(h * GROUP + head, tl.int64) * stride_yh
        for t in tl.range(begin, stop, BLOCK_T):
            token = tl.cast(start + t, tl.int64)
            mask_t = offs_t < stop - t
            if MASKED:
                mask_t = mask_t & tl.load(key_mask_ptr + batch * stride_mb + token + offs_t, mask=mask_t, other=0)
            mask_x, mask_y = mask_t[:, None], mask_t[:, None]
            if not EVEN:
                mask_x, mask_y = mask_x & (offs_d[None, :] < D), mask_y & (offs_dv[None, :] < M)
            x_tile = x_head + token * stride_xt + offs_t[:, None] * stride_xt + offs_d[None, :]
            y_tile = y_head + token * stride_yt + offs_t[:, None] * stride_yt + offs_dv[None, :]
            x, y = tl.load(x_tile, mask=mask_x, other=0.0), tl.load(y_tile, mask=mask_y, other=0.0)
            # [BLOCK_D, BLOCK_T] @ [BLOCK_T, BLOCK_DV] -> [BLOCK_D, BLOCK_DV]
            linear = dot(tl.trans(round_to(x, STATE_DTYPE)), round_to(y, STATE_DTYPE), linear, PRECISION)
            y_sum += tl.sum(y.to(tl.float32), 0)
            x = x.to(tl.float32)
            if HAS_FACTOR:
                f_head = batch * stride_f[0] + tl.cast(h * GROUP + head, tl.int64) * stride_f[1]
                fx = x * -tl.load(f_ptr + f_head + token + offs_t, mask=mask_t, other=0.0)[:, None]
            else:
                fx = x
            if HAS_FACTOR or not REVERSE:
                # [BLOCK_D, BLOCK_T] @ [BLOCK_T, BLOCK_D] -> [BLOCK_D, BLOCK_D]
                gram = dot(tl.trans(x), fx, gram, GRAM_PRECISION)
                x_sum += tl.sum(fx, 0)
            if not REVERSE:
                count += tl.sum(mask_t.to(tl.float32), 0)
    index = slot if CAUSAL else tl.program_id(0)
    moments_ptr += (tl.cast(index, tl.int64) * Hkv + h) * moments_size
    tl.store(moments_ptr + offs_d[:, None] * BLOCK_D + offs_d[None, :], gram * weight_2)
    moments_ptr += BLOCK_D * BLOCK_D
    tl.store(moments_ptr + offs_d[:, None] * BLOCK_DV + offs_dv[None, :], linear * weight_1)
    moments_ptr += BLOCK_D * BLOCK_DV
    tl.store(moments_ptr + offs_d, x_sum * weight_1)
    tl.store(moments_ptr + BLOCK_D + offs_dv, y_sum * weight_0)
    tl.store(moments_ptr + BLOCK_D + BLOCK_DV + tl.arange(0, SLICE), tl.where(tl.arange(0, SLICE) == 0, count, 0.0))


def state_over_keys(problem: ChunkedProblem, before: State, keep_final: bool) -> ChunkState:
    """Sum over keys up to each boundary, from the canonical state `before` on."""
    initial = None
    if before:
        products = state_layout.to_blocks(before[5], problem.q.shape[3], problem.block_d, problem.block_dv)
        moments = state_layout.to_moments(before[1:], before[0], problem.block_d, problem.block_dv)
        initial = (products, moments)
    return _chunk_state(problem, _Tokens(problem.k, problem.v, None, reverse=False), initial, keep_final)


def state_over_queries(
    problem: ChunkedProblem, dout_scaled: Tensor, delta: Tensor | None, dafter: State, keep_final: bool
) -> ChunkState:
    """Sum the gradients to these states over later queries, from the gradients to the state after the call on."""
    initial = None
    if dafter:
        products = state_layout.gradient_to_blocks(dafter[4], problem.q.shape[3], problem.block_d, problem.block_dv)
        initial = (products, state_layout.to_moments(dafter, None, problem.block_d, problem.block_dv))
    return _chunk_state(problem, _Tokens(problem.q, dout_scaled, delta, reverse=True), initial, keep_final)


def _chunk_state(
    problem: ChunkedProblem, tokens: _Tokens, initial: tuple[Tensor, Tensor] | None, keep_final: bool
) -> ChunkState:
    products = _launch_products(problem, tokens, always_scanned=initial is not None or keep_final)
    moments = _launch_moments(problem, tokens)
    final = None
    if keep_final:
        empty = moments.at_boundaries.new_empty
        heads = (problem.num_seqs, problem.kv_heads)
        final = empty(*heads, problem.feature_count, problem.block_dv), empty(*heads, problem.moments_size)
    launch_scan(problem, tokens.x.shape[2], products, moments, ScanEnds(initial, final), tokens.reverse)
    return ChunkState(products.at_boundaries, moments.at_boundaries, final)


def _token_args(problem: ChunkedProblem, tokens: _Tokens) -> dict[str, Any]:
    """Return what both kernels take."""
    x, y, _, reverse = tokens
    key_mask = None if reverse else problem.key_mask
    return {
        **problem.schedule_args(),
        **problem.first_position_args(),
        **problem.size_args(),
        "x_ptr": x,
        "y_ptr": y,
        "stride_x": strides_bht(x),
        "stride_y": strides_bht(y),
        "key_mask_ptr": key_mask,
        "stride_mb": 0 if key_mask is None else key_mask.stride(0),
        "MASKED": key_mask is not None,
        "T": x.shape[2],
        "Tk": problem.k.shape[2],
        "Hkv": problem.kv_heads,
        "NUM_SEQS": problem.num_seqs,
        "q_offset": problem.options.q_offset,
        "REVERSE": reverse,
        "GROUP": problem.group if reverse else 1,
        "STATE_DTYPE": TRITON_DTYPE[STATE_DTYPE[x.dtype]],
        "PRECISION": precision(STATE_DTYPE[x.dtype]),
    }


def _launch_products(problem: ChunkedProblem, tokens: _Tokens, always_scanned: bool) -> RunSums:
    """Sum products within runs."""
    x, reverse, causal, tile = tokens.x, tokens.reverse, problem.options.is_causal, problem.tiles.products
    T, shape = x.shape[2], (problem.kv_heads, problem.feature_count, problem.block_dv)
    products = x.new_empty(problem.slots, *shape, dtype=STATE_DTYPE[x.dtype])
    run = _run_length(problem, T)
    # Forward nothing comes to boundary 0: there is one chunk less than there are boundaries.
    per_sequence = triton.cdiv((problem.num_boundaries - (not reverse)) * problem.chunk if causal else T, run)
    runs = problem.num_programs(per_sequence, run)
    scanned = always_scanned or not causal or runs > problem.num_seqs
    totals = x.new_empty(runs if scanned else 0, *shape, dtype=torch.float32)
    regular = (reverse or problem.key_mask is None) and problem.cu_seqlens is None and problem.tables is None
    aligned = T % tile.BLOCK_T == 0 and (problem.options.q_offset if reverse else 0) % tile.BLOCK_T == 0
    launch(
        chunk_products_kernel,
        (problem.feature_count // FEATURES.value, runs, problem.kv_heads),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        BLOCK_T=tile.BLOCK_T,
        **_token_args(problem, tokens),
        products_ptr=products,
        totals_ptr=totals,
        RUN=run,
        num_runs=per_sequence,
        weight=2 * problem.weights[2],
        KEEP_TOTALS=scanned,
        EVEN_T=regular and aligned,
    )
    return RunSums(products, totals, run, per_sequence, scanned)


def _launch_moments(problem: ChunkedProblem, tokens: _Tokens) -> RunSums:
    """Sum moments within runs. They are small: one program makes those of a whole chunk."""
    x, f, causal, tile = tokens.x, tokens.f, problem.options.is_causal, problem.tiles.moments
    shape = (problem.kv_heads, problem.moments_size)
    run = problem.chunk if causal else _run_length(problem, x.shape[2])
    per_sequence = problem.num_boundaries if causal else triton.cdiv(x.shape[2], run)
    runs = problem.num_programs(per_sequence, run)
    moments = x.new_empty(problem.slots, *shape, dtype=torch.float32)
    totals = moments if causal else moments.new_empty(runs, *shape)
    weight_0, weight_1, weight_2 = problem.weights if tokens.reverse else (1.0, 1.0, 1.0)
    launch(
        chunk_moments_kernel,
        (runs, problem.kv_heads),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        BLOCK_T=tile.BLOCK_T,
        **_token_args(problem, tokens),
        moments_ptr=totals,
        f_ptr=f,
        stride_f=(0, 0) if f is None else f.stride()[:2],
        RUN=run,
        num_runs=per_sequence,
        moments_size=problem.moments_size,
        weight_0=weight_0,
        weight_1=weight_1,
        weight_2=weight_2,
        HAS_FACTOR=f is not None,
        GRAM_PRECISION=gram_precision(x.dtype),
    )
    return RunSums(moments, totals, run, per_sequence)


def _run_length(problem: ChunkedProblem, T: int) -> int:
    """Choose the tokens of a run: as many as leave enough programs to fill the chip; whole chunks if causal."""
    causal, tile = problem.options.is_causal, problem.tiles.products
    length, step = (problem.k.shape[2], problem.chunk) if causal else (T, 8 * tile.BLOCK_T)
    enough = triton.cdiv(problem.tiles.programs, problem.feature_count // FEATURES.value * problem.total_heads)
    return max(length // (step * enough), 1) * step
