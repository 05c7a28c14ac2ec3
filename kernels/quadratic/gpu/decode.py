"""A few tokens beside a state, as in decoding: one pass over the canonical state, which is loaded, updated and stored.

`decode_state_kernel` cuts the state into blocks: of kkv, the products, and then of rows of kk, kv and k_sum, together.
A block computes its part of each query's sums, in fp32, and takes the new keys. `decode_output_kernel` adds up these
parts and the scores of the new keys, which no query takes from a state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import block_size, launch, strides_bht
from linattn.kernels.common.gpu.mainloop import weigh
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.quadratic.contract import state_shapes
from linattn.kernels.quadratic.gpu import config
from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.common.op.stateful import ForwardInputs, Outputs
    from linattn.kernels.quadratic.gpu.state_layout import State

BLOCKS_AT_ONCE = 32
"""Blocks whose parts are loaded together."""


def applies(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, initial_state: State) -> bool:
    """Return whether a call is so short that the time to pass over its state is all of its time."""
    few = max(q.shape[2], k.shape[2]) <= config.DECODE_TOKENS
    queries = q.shape[1] // k.shape[1] * q.shape[2]
    return bool(initial_state) and cu_seqlens is None and few and queries <= config.DECODE_QUERIES


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute out, l and, if asked for, the state after the tokens; nothing is saved."""
    problem = ChunkedProblem.of(inputs)
    return_state = inputs.return_state
    B, H, Tq, D = problem.q.shape
    Hkv, M, tile = problem.kv_heads, problem.v.shape[3], problem.tiles.decode
    out, l = empty_in_storage_order(problem.q, M), empty_row_sums(problem.q)
    before = [x.contiguous() for x in inputs.initial_state]
    after = [x.new_empty(s) for x, s in zip(before, state_shapes(B, Hkv, D, M), strict=True)] if return_state else []
    products, columns = (tile.numbers // width for width in (problem.block_dv, max(problem.block_d, problem.block_dv)))
    blocks = triton.cdiv(D * (D + 1) // 2, products), triton.cdiv(D, columns)
    parts = {
        "o_parts_ptr": l.new_empty(B, H, Tq, sum(blocks), problem.block_dv),
        "l_parts_ptr": l.new_empty(B, H, Tq, blocks[1]),
        "PRODUCT_BLOCKS": blocks[0],
        "MOMENT_BLOCKS": blocks[1],
    }
    sizes = {"H": H, "D": D, "M": M, "BLOCK_D": problem.block_d, "BLOCK_DV": problem.block_dv}
    weight_0, weight_1, weight_2 = problem.weights
    launch(
        decode_state_kernel,
        (sum(blocks), Hkv, B),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **problem.qkv_args(),
        **_state_args("", before),
        **_state_args("_after", after),
        **parts,
        **sizes,
        weight_0=weight_0,
        weight_1=weight_1,
        weight_2=weight_2,
        PRODUCTS_PER_BLOCK=products,
        COLUMNS_PER_BLOCK=columns,
        RETURN_STATE=return_state,
    )
    launch(
        decode_output_kernel,
        (Tq, H, B),
        num_warps=4,
        num_stages=1,
        **problem.qkv_args(),
        **problem.similarity_args(),
        **parts,
        **sizes,
        o_ptr=out,
        stride_o=strides_bht(out),
        l_ptr=l,
        q_offset=problem.options.q_offset,
        BLOCKS_AT_ONCE=BLOCKS_AT_ONCE,
        NORMALIZE=problem.options.normalize,
        CAUSAL=problem.options.is_causal,
    )
    return out, l, after, []


def _state_args(suffix: str, state: State) -> dict[str, Any]:
    """Name the tensors of a canonical state, None if there is none."""
    tensors: list[Tensor | None] = [*state] if state else [None] * 6
    n, k_sum, kk, v_sum, kv, kkv = tensors
    return {
        f"n{suffix}_ptr": n,
        f"k_sum{suffix}_ptr": k_sum,
        f"kk{suffix}_ptr": kk,
        f"v_sum{suffix}_ptr": v_sum,
        f"kv{suffix}_ptr": kv,
        f"kkv{suffix}_ptr": kkv,
    }


def describe(q: Tensor, v: Tensor) -> str:
    """Name the kernels of a call beside a state, and their configuration."""
    name = architecture(q.device)
    tile = config.configuration(name, q.dtype, max(block_size(q.shape[3]), block_size(v.shape[3]))).decode
    return f"Triton, {name}: one pass over the state in blocks of {tile.numbers} numbers, {tile.num_warps} warps"


@triton.jit
def columns_of(product):
    """Return columns a and b <= a of products a (a + 1) / 2 + b."""
    a = ((tl.sqrt((8 * product + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    a += ((a + 1) * (a + 2) // 2 <= product).to(tl.int32)  # a square root may be rounded either way
    a -= (a * (a + 1) // 2 > product).to(tl.int32)
    return a, product - a * (a + 1) // 2


@triton.jit
def load_token(ptr, offs, mask):
    """Load some columns of a token in fp32."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def key_counts(key_mask_ptr, t, KEY_MASK: tl.constexpr):
    """Return 1 if key t counts, else 0."""
    if KEY_MASK:
        return tl.load(key_mask_ptr + t).to(tl.int32)
    return 1


@triton.jit
def decode_products(
    block,
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    kkv_ptr,
    kkv_after_ptr,
    o_parts_ptr,
    stride_qh,
    stride_qt,
    stride_kt,
    stride_vt,
    T,
    Tk,
    weight_2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRODUCTS_PER_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    RETURN_STATE: tl.constexpr,
):
    """Compute o_part = w2 phi(q) kkv over some products; kkv += phi(k) v^T."""
    product, offs_dv = block * PRODUCTS_PER_BLOCK + tl.arange(0, PRODUCTS_PER_BLOCK), tl.arange(0, BLOCK_DV)
    a, b = columns_of(product)
    inside = a < D
    offs, mask = product[:, None] * M + offs_dv[None, :], inside[:, None] & (offs_dv < M)[None, :]
    kkv = tl.load(kkv_ptr + offs, mask=mask, other=0.0)
    weight = tl.where(a == b, weight_2, 2 * weight_2)
    for query in range(GROUP * T):
        q_token = q_ptr + query // T * stride_qh + query % T * stride_qt
        phi = load_token(q_token, a, inside) * load_token(q_token, b, inside) * weight
        tl.store(o_parts_ptr + (query * BLOCKS + block) * BLOCK_DV + offs_dv, tl.sum(phi[:, None] * kkv, 0))
    if RETURN_STATE:
        for t in range(Tk):
            counts = key_counts(key_mask_ptr, t, KEY_MASK)
            k_token = k_ptr + t * stride_kt
            phi = load_token(k_token, a, a < D * counts) * load_token(k_token, b, a < D * counts)
            kkv += phi[:, None] * load_token(v_ptr + t * stride_vt, offs_dv, offs_dv < M * counts)[None, :]
        tl.store(kkv_after_ptr + offs, kkv, mask=mask)


@triton.jit
def decode_moments(
    block,
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    n_ptr,
    k_sum_ptr,
    kk_ptr,
    v_sum_ptr,
    kv_ptr,
    n_after_ptr,
    k_sum_after_ptr,
    kk_after_ptr,
    v_sum_after_ptr,
    kv_after_ptr,
    o_parts_ptr,
    l_parts_ptr,
    stride_qh,
    stride_qt,
    stride_kt,
    stride_vt,
    T,
    Tk,
    weight_0,
    weight_1,
    weight_2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    COLUMNS_PER_BLOCK: tl.constexpr,
    PRODUCT_BLOCKS: tl.constexpr,
    MOMENT_BLOCKS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    RETURN_STATE: tl.constexpr,
):
    """Compute o_part = w1 q kv + w0 v_sum and l_part = w1 q.k_sum + w2 q.kk q + w0 n over some columns of q; the first
    block has v_sum and n. Then kk += k k^T, kv += k v^T, k_sum += k, v_sum += v, n += 1.
    """
    # Over 60 lines: more than half of them are the signature.
    a, offs_d, offs_dv = (
        block * COLUMNS_PER_BLOCK + tl.arange(0, COLUMNS_PER_BLOCK),
        tl.arange(0, BLOCK_D),
        tl.arange(0, BLOCK_DV),
    )
    inside, in_d, in_dv = a < D, offs_d < D, offs_dv < M
    of_first = offs_dv < tl.where(block == 0, M, 0)
    gram, in_gram = a[:, None] * D + offs_d[None, :], inside[:, None] & in_d[None, :]
    linear, in_linear = a[:, None] * M + offs_dv[None, :], inside[:, None] & in_dv[None, :]
    kk = tl.load(kk_ptr + gram, mask=in_gram, other=0.0)
    kv = tl.load(kv_ptr + linear, mask=in_linear, other=0.0)
    k_sum = tl.load(k_sum_ptr + a, mask=inside, other=0.0)
    v_sum = tl.load(v_sum_ptr + offs_dv, mask=of_first, other=0.0)
    n = tl.load(n_ptr)
    o_index = PRODUCT_BLOCKS + block
    for query in range(GROUP * T):
        q_token = q_ptr + query // T * stride_qh + query % T * stride_qt
        x, y = load_token(q_token, a, inside), load_token(q_token, offs_d, in_d)
        part = tl.sum((x * weight_1)[:, None] * kv, 0) + v_sum * weight_0
        l = tl.sum(x * (weight_1 * k_sum + weight_2 * tl.sum(kk * y[None, :], 1)), 0)
        l += tl.where(block == 0, weight_0 * n.to(tl.float32), 0.0)
        tl.store(o_parts_ptr + (query * (PRODUCT_BLOCKS + MOMENT_BLOCKS) + o_index) * BLOCK_DV + offs_dv, part)
        tl.store(l_parts_ptr + query * MOMENT_BLOCKS + block, l)
    if RETURN_STATE:
        for t in range(Tk):
            counts = key_counts(key_mask_ptr, t, KEY_MASK)
            x = load_token(k_ptr + t * stride_kt, a, a < D * counts)
            y = load_token(v_ptr + t * stride_vt, offs_dv, offs_dv < M * counts)
            kk += x[:, None] * load_token(k_ptr + t * stride_kt, offs_d, offs_d < D * counts)[None, :]
            kv += x[:, None] * y[None, :]
            k_sum += x
            v_sum += y
            n += counts
        tl.store(kk_after_ptr + gram, kk, mask=in_gram)
        tl.store(kv_after_ptr + linear, kv, mask=in_linear)
        tl.store(k_sum_after_ptr + a, k_sum, mask=inside)
        tl.store(v_sum_after_ptr + offs_dv, v_sum, mask=of_first)
        tl.store(n_after_ptr, n, mask=(block == 0) & (tl.program_id(1) == 0))


@triton.jit
def decode_state_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    n_ptr,
    k_sum_ptr,
    kk_ptr,
    v_sum_ptr,
    kv_ptr,
    kkv_ptr,
    n_after_ptr,
    k_sum_after_ptr,
    kk_after_ptr,
    v_sum_after_ptr,
    kv_after_ptr,
    kkv_after_ptr,
    o_parts_ptr,
    l_parts_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_mb,
    H,
    T,
    Tk,
    weight_0,
    weight_1,
    weight_2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRODUCTS_PER_BLOCK: tl.constexpr,
    COLUMNS_PER_BLOCK: tl.constexpr,
    PRODUCT_BLOCKS: tl.constexpr,
    MOMENT_BLOCKS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    RETURN_STATE: tl.constexpr,
):
    """Compute o_part = phi(q) S over one block of the state of one key head; S += phi(k) v^T."""
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature and the two calls, one argument a line.
    block, h, s = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    q_ptr += s * stride_qb + h * GROUP * stride_qh
    k_ptr += s * stride_kb + h * stride_kh
    v_ptr += s * stride_vb + h * stride_vh
    if KEY_MASK:
        key_mask_ptr += s * stride_mb
    index, query_0 = s * (H // GROUP) + h, (s * H + h * GROUP) * T
    o_parts_ptr += query_0 * (PRODUCT_BLOCKS + MOMENT_BLOCKS) * BLOCK_DV
    if RETURN_STATE:
        n_after_ptr += s
        k_sum_after_ptr += index * D
        kk_after_ptr += index * D * D
        v_sum_after_ptr += index * M
        kv_after_ptr += index * D * M
        kkv_after_ptr += index * (D * (D + 1) // 2) * M
    if block < PRODUCT_BLOCKS:
        kkv_ptr += index * (D * (D + 1) // 2) * M
        decode_products(
            block,
            q_ptr,
            k_ptr,
            v_ptr,
            key_mask_ptr,
            kkv_ptr,
            kkv_after_ptr,
            o_parts_ptr,
            stride_qh,
            stride_qt,
            stride_kt,
            stride_vt,
            T,
            Tk,
            weight_2,
            GROUP=GROUP,
            D=D,
            M=M,
            BLOCK_DV=BLOCK_DV,
            PRODUCTS_PER_BLOCK=PRODUCTS_PER_BLOCK,
            BLOCKS=PRODUCT_BLOCKS + MOMENT_BLOCKS,
            KEY_MASK=KEY_MASK,
            RETURN_STATE=RETURN_STATE,
        )
    else:
        decode_moments(
            block - PRODUCT_BLOCKS,
            q_ptr,
            k_ptr,
            v_ptr,
            key_mask_ptr,
            n_ptr + s,
            k_sum_ptr + index * D,
            kk_ptr + index * D * D,
            v_sum_ptr + index * M,
            kv_ptr + index * D * M,
            n_after_ptr,
            k_sum_after_ptr,
            kk_after_ptr,
            v_sum_after_ptr,
            kv_after_ptr,
            o_parts_ptr,
            l_parts_ptr + query_0 * MOMENT_BLOCKS,
            stride_qh,
            stride_qt,
            stride_kt,
            stride_vt,
            T,
            Tk,
            weight_0,
            weight_1,
            weight_2,
            GROUP=GROUP,
            D=D,
            M=M,
            BLOCK_D=BLOCK_D,
            BLOCK_DV=BLOCK_DV,
            COLUMNS_PER_BLOCK=COLUMNS_PER_BLOCK,
            PRODUCT_BLOCKS=PRODUCT_BLOCKS,
            MOMENT_BLOCKS=MOMENT_BLOCKS,
            KEY_MASK=KEY_MASK,
            RETURN_STATE=RETURN_STATE,
        )


@triton.jit
def decode_output_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    o_ptr,
    l_ptr,
    o_parts_ptr,
    l_parts_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_mb,
    H,
    T,
    Tk,
    q_offset,
    a,
    b,
    c,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRODUCT_BLOCKS: tl.constexpr,
    MOMENT_BLOCKS: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
    SIMILARITY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    """Compute o = (sum of o_parts + sum_j p_j v_j) / l with l = sum of l_parts + sum_j p_j for one query, j over the
    new keys.
    """
    # Over 60 lines: more than half of them are the signature.
    BLOCKS: tl.constexpr = PRODUCT_BLOCKS + MOMENT_BLOCKS
    t, h, s = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64), tl.cast(tl.program_id(2), tl.int64)
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    q_ptr += s * stride_qb + h * stride_qh + t * stride_qt
    k_ptr += s * stride_kb + h // GROUP * stride_kh
    v_ptr += s * stride_vb + h // GROUP * stride_vh
    if KEY_MASK:
        key_mask_ptr += s * stride_mb
    query = (s * H + h) * T + t
    offs_d, offs_dv, offs_block = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCKS_AT_ONCE)
    acc, l = tl.zeros([BLOCK_DV], tl.float32), 0.0
    for first in range(0, BLOCKS, BLOCKS_AT_ONCE):
        block = first + offs_block
        part = o_parts_ptr + (query * BLOCKS + block[:, None]) * BLOCK_DV + offs_dv[None, :]
        acc += tl.sum(tl.load(part, mask=(block < BLOCKS)[:, None], other=0.0), 0)
    for block in range(MOMENT_BLOCKS):
        l += tl.load(l_parts_ptr + query * MOMENT_BLOCKS + block)
    q = load_token(q_ptr, offs_d, offs_d < D)
    for j in range(Tk):
        seen = key_counts(key_mask_ptr, j, KEY_MASK)
        if CAUSAL:
            seen = tl.where(j <= t + q_offset, seen, 0)
        k = load_token(k_ptr + j * stride_kt, offs_d, offs_d < D * seen)
        p = weigh(tl.sum(q * k, 0), a, b, c, SIMILARITY) * seen
        acc += p * load_token(v_ptr + j * stride_vt, offs_dv, offs_dv < M * seen)
        l += p
    if NORMALIZE:
        acc = acc / tl.where(l <= 0, float("inf"), l)
    o_ptr += s * stride_ob + h * stride_oh + t * stride_ot
    tl.store(o_ptr + offs_dv, round_to(acc, IN_DTYPE), mask=offs_dv < M)
    tl.store(l_ptr + query, l)
