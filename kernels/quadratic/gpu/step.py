"""A few tokens beside a state, as in decoding: one pass over the canonical state, which is read, updated and written.

`step_state` cuts the state into blocks of rows: of kkv, products of pairs, and then of kk, kv and k_sum, together. A
block gives what it adds to each query's sums, in fp32, and takes the new keys. `finish_rows` adds up what the blocks
gave and the scores of the new keys, which no query reads from a state.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import block_size, strides
from linattn.kernels.common.gpu.mainloop import weigh
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.quadratic.contract import state_shapes
from linattn.kernels.quadratic.gpu import config
from linattn.kernels.quadratic.gpu.call import Call, run_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.common.op.stateful import ForwardInputs, Outputs
    from linattn.kernels.quadratic.gpu.layout import State

STATE = ("n", "k_sum", "kk", "v_sum", "kv", "kkv")
FINISH = config.Fold(32, 4, 1)


def runs(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, initial_state: State) -> bool:
    """Whether a call is so short that the time to pass over its state is all of its time."""
    few = max(q.shape[2], k.shape[2]) <= config.STEP_TOKENS
    queries = q.shape[1] // k.shape[1] * q.shape[2]
    return bool(initial_state) and cu_seqlens is None and few and queries <= config.STEP_QUERIES


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute the op's results in one pass over the state."""
    q, k, v, key_mask, _, initial_state, options, return_state, _, plan = inputs
    call = Call.of(q, k, v, key_mask, None, initial_state, options, plan)
    B, H, Tq, D = call.q.shape
    Hkv, M, tile = call.Hkv, v.shape[3], call.row.step
    out, l = empty_in_storage_order(call.q, M), empty_row_sums(call.q)
    before = [x.contiguous() for x in initial_state]
    after = [x.new_empty(s) for x, s in zip(before, state_shapes(B, Hkv, D, M), strict=True)] if return_state else []
    PAIRS, ROWS = (tile.numbers // width for width in (call.BLOCK_M, max(call.BLOCK_D, call.BLOCK_M)))
    of_pairs, of_rows = triton.cdiv(D * (D + 1) // 2, PAIRS), triton.cdiv(D, ROWS)
    parts = l.new_empty(B, H, Tq, of_pairs + of_rows, call.BLOCK_M)
    l_parts = l.new_empty(B, H, Tq, of_rows)
    c0, c1, c2 = call.weights
    arguments = call.pairs() | dict(
        {f"{name}_ptr": x for name, x in zip(STATE, before, strict=True)},
        **{f"{name}_after_ptr": x for name, x in itertools.zip_longest(STATE, after)},
        **strides("out", out, "o"), l_ptr=l, parts_ptr=parts, l_parts_ptr=l_parts, H=H, D=D, M=M,
        weight_0=c0, weight_1=c1, weight_2=c2, q_offset=call.options.q_offset, CAUSAL=call.options.is_causal,
        BLOCK_D=call.BLOCK_D, BLOCK_M=call.BLOCK_M, PAIRS=PAIRS, ROWS=ROWS, OF_PAIRS=of_pairs, OF_ROWS=of_rows,
        BLOCK_P=FINISH.BLOCK_T, AFTER=return_state,
    )  # fmt: skip
    run_kernel(step_state, (of_pairs + of_rows, Hkv, B), tile, arguments)
    run_kernel(finish_rows, (Tq, H, B), FINISH, arguments)
    return out, l, after, []


def describe(q: Tensor, v: Tensor) -> str:
    """The kernels of a call beside a state, and their configuration."""
    name = architecture(q.device)
    tile = config.row(name, q.dtype, max(block_size(q.shape[3]), block_size(v.shape[3]))).step
    return f"Triton, {name}: one pass over the state in blocks of {tile.numbers} numbers, {tile.num_warps} warps"


@triton.jit
def factors(pair):
    """Rows a and columns b <= a of pairs a (a + 1) / 2 + b."""
    a = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    a += ((a + 1) * (a + 2) // 2 <= pair).to(tl.int32)  # a square root may be rounded either way
    a -= (a * (a + 1) // 2 > pair).to(tl.int32)
    return a, pair - a * (a + 1) // 2


@triton.jit
def load_row(ptr, offs, inside):
    return tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def key_counts(key_mask_ptr, t, KEY_MASK: tl.constexpr):
    """1 if key t counts, else 0."""
    if KEY_MASK:
        return tl.load(key_mask_ptr + t).to(tl.int32)
    return 1


@triton.jit
def step_pairs(
    block, q_ptr, k_ptr, v_ptr, key_mask_ptr, kkv_ptr, kkv_after_ptr, parts_ptr,
    stride_qh, stride_qt, stride_kt, stride_vt, T, Tk, weight_2,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr,
    BLOCKS: tl.constexpr, KEY_MASK: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """One block of products of two."""
    pair, offs_m = block * PAIRS + tl.arange(0, PAIRS), tl.arange(0, BLOCK_M)
    a, b = factors(pair)
    inside = a < D
    offs, mask = pair[:, None] * M + offs_m[None, :], inside[:, None] & (offs_m < M)[None, :]
    kkv = tl.load(kkv_ptr + offs, mask=mask, other=0.0)
    weight = tl.where(a == b, weight_2, 2 * weight_2)
    for row in range(GROUP * T):
        q_row = q_ptr + row // T * stride_qh + row % T * stride_qt
        phi = load_row(q_row, a, inside) * load_row(q_row, b, inside) * weight
        tl.store(parts_ptr + (row * BLOCKS + block) * BLOCK_M + offs_m, tl.sum(phi[:, None] * kkv, 0))
    if AFTER:
        for t in range(Tk):
            counts = key_counts(key_mask_ptr, t, KEY_MASK)
            k_row = k_ptr + t * stride_kt
            phi = load_row(k_row, a, a < D * counts) * load_row(k_row, b, a < D * counts)
            kkv += phi[:, None] * load_row(v_ptr + t * stride_vt, offs_m, offs_m < M * counts)[None, :]
        tl.store(kkv_after_ptr + offs, kkv, mask=mask)


@triton.jit
def step_rows(
    block, q_ptr, k_ptr, v_ptr, key_mask_ptr, n_ptr, k_sum_ptr, kk_ptr, v_sum_ptr, kv_ptr,
    n_after_ptr, k_sum_after_ptr, kk_after_ptr, v_sum_after_ptr, kv_after_ptr, parts_ptr, l_parts_ptr,
    stride_qh, stride_qt, stride_kt, stride_vt, T, Tk, weight_0, weight_1, weight_2,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, BEFORE: tl.constexpr, KEY_MASK: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Some rows of kk, kv and k_sum; the first block has v_sum and n too."""
    a, offs_d, offs_m = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    inside, in_d, in_m = a < D, offs_d < D, offs_m < M
    of_first = offs_m < tl.where(block == 0, M, 0)
    gram, in_gram = a[:, None] * D + offs_d[None, :], inside[:, None] & in_d[None, :]
    linear, in_linear = a[:, None] * M + offs_m[None, :], inside[:, None] & in_m[None, :]
    kk = tl.load(kk_ptr + gram, mask=in_gram, other=0.0)
    kv = tl.load(kv_ptr + linear, mask=in_linear, other=0.0)
    k_sum = tl.load(k_sum_ptr + a, mask=inside, other=0.0)
    v_sum = tl.load(v_sum_ptr + offs_m, mask=of_first, other=0.0)
    n = tl.load(n_ptr)
    for row in range(GROUP * T):
        q_row = q_ptr + row // T * stride_qh + row % T * stride_qt
        x, y = load_row(q_row, a, inside), load_row(q_row, offs_d, in_d)
        part = tl.sum((x * weight_1)[:, None] * kv, 0) + v_sum * weight_0
        l = tl.sum(x * (weight_1 * k_sum + weight_2 * tl.sum(kk * y[None, :], 1)), 0)
        l += tl.where(block == 0, weight_0 * n.to(tl.float32), 0.0)
        tl.store(parts_ptr + (row * (BEFORE + BLOCKS) + BEFORE + block) * BLOCK_M + offs_m, part)
        tl.store(l_parts_ptr + row * BLOCKS + block, l)
    if AFTER:
        for t in range(Tk):
            counts = key_counts(key_mask_ptr, t, KEY_MASK)
            x = load_row(k_ptr + t * stride_kt, a, a < D * counts)
            y = load_row(v_ptr + t * stride_vt, offs_m, offs_m < M * counts)
            kk += x[:, None] * load_row(k_ptr + t * stride_kt, offs_d, offs_d < D * counts)[None, :]
            kv += x[:, None] * y[None, :]
            k_sum += x
            v_sum += y
            n += counts
        tl.store(kk_after_ptr + gram, kk, mask=in_gram)
        tl.store(kv_after_ptr + linear, kv, mask=in_linear)
        tl.store(k_sum_after_ptr + a, k_sum, mask=inside)
        tl.store(v_sum_after_ptr + offs_m, v_sum, mask=of_first)
        tl.store(n_after_ptr, n, mask=(block == 0) & (tl.program_id(1) == 0))


@triton.jit
def step_state(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, n_ptr, k_sum_ptr, kk_ptr, v_sum_ptr, kv_ptr, kkv_ptr,
    n_after_ptr, k_sum_after_ptr, kk_after_ptr, v_sum_after_ptr, kv_after_ptr, kkv_after_ptr, parts_ptr, l_parts_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    H, T, Tk, weight_0, weight_1, weight_2,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, OF_PAIRS: tl.constexpr, OF_ROWS: tl.constexpr,
    KEY_MASK: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """One block of the state of one key head."""
    block, h, s = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    q_ptr += s * stride_qb + h * GROUP * stride_qh
    k_ptr += s * stride_kb + h * stride_kh
    v_ptr += s * stride_vb + h * stride_vh
    if KEY_MASK:
        key_mask_ptr += s * stride_mb
    place, row_0 = s * (H // GROUP) + h, (s * H + h * GROUP) * T
    parts_ptr += row_0 * (OF_PAIRS + OF_ROWS) * BLOCK_M
    if AFTER:
        n_after_ptr += s
        k_sum_after_ptr += place * D
        kk_after_ptr += place * D * D
        v_sum_after_ptr += place * M
        kv_after_ptr += place * D * M
        kkv_after_ptr += place * (D * (D + 1) // 2) * M
    if block < OF_PAIRS:
        kkv_ptr += place * (D * (D + 1) // 2) * M
        step_pairs(
            block, q_ptr, k_ptr, v_ptr, key_mask_ptr, kkv_ptr, kkv_after_ptr, parts_ptr,
            stride_qh, stride_qt, stride_kt, stride_vt, T, Tk, weight_2,
            GROUP, D, M, BLOCK_M, PAIRS, OF_PAIRS + OF_ROWS, KEY_MASK, AFTER,
        )  # fmt: skip
    else:
        step_rows(
            block - OF_PAIRS, q_ptr, k_ptr, v_ptr, key_mask_ptr,
            n_ptr + s, k_sum_ptr + place * D, kk_ptr + place * D * D, v_sum_ptr + place * M, kv_ptr + place * D * M,
            n_after_ptr, k_sum_after_ptr, kk_after_ptr, v_sum_after_ptr, kv_after_ptr,
            parts_ptr, l_parts_ptr + row_0 * OF_ROWS,
            stride_qh, stride_qt, stride_kt, stride_vt, T, Tk, weight_0, weight_1, weight_2,
            GROUP, D, M, BLOCK_D, BLOCK_M, ROWS, OF_ROWS, OF_PAIRS, KEY_MASK, AFTER,
        )  # fmt: skip


@triton.jit
def finish_rows(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, out_ptr, l_ptr, parts_ptr, l_parts_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_ob, stride_oh, stride_ot,
    H, T, Tk, q_offset, a, b, c,
    GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    OF_PAIRS: tl.constexpr, OF_ROWS: tl.constexpr, BLOCK_P: tl.constexpr, SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """One row: what the blocks of the state gave it, and the new keys."""
    BLOCKS: tl.constexpr = OF_PAIRS + OF_ROWS
    t, h, s = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    q_ptr += s * stride_qb + h * stride_qh + t * stride_qt
    k_ptr += s * stride_kb + h // GROUP * stride_kh
    v_ptr += s * stride_vb + h // GROUP * stride_vh
    if KEY_MASK:
        key_mask_ptr += s * stride_mb
    row = (s * H + h) * T + t
    offs_d, offs_m, offs_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_P)
    acc, l = tl.zeros([BLOCK_M], tl.float32), 0.0
    for first in range(0, BLOCKS, BLOCK_P):
        block = first + offs_p
        part = parts_ptr + (row * BLOCKS + block[:, None]) * BLOCK_M + offs_m[None, :]
        acc += tl.sum(tl.load(part, mask=(block < BLOCKS)[:, None], other=0.0), 0)
    for block in range(OF_ROWS):
        l += tl.load(l_parts_ptr + row * OF_ROWS + block)
    q = load_row(q_ptr, offs_d, offs_d < D)
    for j in range(Tk):
        seen = key_counts(key_mask_ptr, j, KEY_MASK)
        if CAUSAL:
            seen = tl.where(j <= t + q_offset, seen, 0)
        k = load_row(k_ptr + j * stride_kt, offs_d, offs_d < D * seen)
        p = weigh(tl.sum(q * k, 0), a, b, c, SIMILARITY) * seen
        acc += p * load_row(v_ptr + j * stride_vt, offs_m, offs_m < M * seen)
        l += p
    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)
    out_ptr += s * stride_ob + h * stride_oh + t * stride_ot
    tl.store(out_ptr + offs_m, round_to(acc, LOW), mask=offs_m < M)
    tl.store(l_ptr + row, l)
