"""Reading sums: what the keys (or rows) that were folded into them give to a tile of x, and its gradient.

phi(x) S takes features two slices of 16 at a time; they exist in registers only. Sums carry twice their weight where a
feature stands for one pair only, hence the half on blocks of the diagonal, which hold each pair twice. The gradient
contracts the symmetric matrix sum over m of S[i, j, m] y_m with x: dx_j = sum x_i y_m S[i, j, m], whose factor x_i y_m
is formed like a feature.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.quadratic.gpu.state import SLICE, product


@triton.jit
def load_columns(tile, first, offs, size, EVEN: tl.constexpr):
    """Columns first + offs of a tile of rows. All rows must exist, and none matters to another."""
    if EVEN:
        return tl.load(tile + first + offs[None, :])
    return tl.load(tile + first + offs[None, :], mask=(first + offs < size)[None, :], other=0.0)


@triton.jit
def read_pairs(
    acc, x_tile, sums_ptr, D,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + phi(x) S over products of two."""
    ROWS: tl.constexpr = acc.shape[0]
    offs_i, offs_j, offs = tl.arange(0, WIDTH), tl.arange(0, SLICE), tl.arange(0, WIDTH * SLICE)
    s_tile = sums_ptr + offs[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    i, j = 0, 0
    for _ in tl.range(0, BLOCK_D * (BLOCK_D // 16 + 1) // 2 // WIDTH):
        xi = load_columns(x_tile, tl.multiple_of(i, WIDTH), offs_i, D, EVEN)
        xj = load_columns(x_tile, tl.multiple_of(j, SLICE), offs_j, D, EVEN)
        xi = xi * tl.where(i >= j, 0.5, 1.0).to(xi.dtype)
        phi = product(xi[:, :, None], xj[:, None, :], FOLD).reshape(ROWS, WIDTH * SLICE)
        acc = dot(phi, tl.load(s_tile), acc, PRECISION)
        s_tile += WIDTH * SLICE * BLOCK_M
        i += WIDTH
        beyond = i >= j + SLICE
        j = tl.where(beyond, j + SLICE, j)
        i = tl.where(beyond, 0, i)
    return acc


@triton.jit
def pull_pairs(
    acc, x_tile, y_tile, sums_ptr, D, M,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + the gradient to x of phi(x) S . y."""
    ROWS: tl.constexpr = acc.shape[0]
    offs_i, offs_m, offs = tl.arange(0, WIDTH), tl.arange(0, SLICE), tl.arange(0, WIDTH * SLICE)
    offs_j = tl.arange(0, BLOCK_D)
    A = offs_j // SLICE
    own = A * (A + 1) // 2 * 256 + offs_j % SLICE  # the block row of j, up to its own diagonal; beyond, that of i
    i, m = 0, 0
    for _ in tl.range(0, BLOCK_D // WIDTH * (BLOCK_M // 16)):
        xi = load_columns(x_tile, tl.multiple_of(i, WIDTH), offs_i, D, EVEN)
        y = load_columns(y_tile, tl.multiple_of(m, SLICE), offs_m, M, EVEN)
        factor = product(xi[:, :, None], y[:, None, :], FOLD).reshape(ROWS, WIDTH * SLICE)
        I = i // SLICE
        rows = i + offs // SLICE
        other = I * (I + 1) // 2 * 256 + offs_j[None, :] * SLICE + rows[:, None] % SLICE
        place = tl.where((A >= I)[None, :], own[None, :] + rows[:, None] * SLICE, other)
        s = tl.load(sums_ptr + place * BLOCK_M + tl.multiple_of(m, SLICE) + (offs % SLICE)[:, None])
        acc = dot(factor, s, acc, PRECISION)
        m += SLICE
        beyond = m >= BLOCK_M
        i = tl.where(beyond, i + WIDTH, i)
        m = tl.where(beyond, 0, m)
    return acc


@triton.jit
def read_record(
    acc, x_tile, record_ptr, D, weight_0, weight_1, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + the terms of degree 1 and 0. Wide numbers go through shared memory by slices, since three TF32 products
    hold each twice there.
    """
    STEP: tl.constexpr = SLICE if tl.float32 == FOLD else BLOCK_D
    offs_d, offs_m = tl.arange(0, STEP), tl.arange(0, BLOCK_M)
    linear_ptr = record_ptr + BLOCK_D * BLOCK_D
    for first in tl.range(0, BLOCK_D, STEP):
        linear = tl.load(linear_ptr + (first + offs_d)[:, None] * BLOCK_M + offs_m[None, :]) * weight_1
        x = round_to(load_columns(x_tile, tl.multiple_of(first, STEP), offs_d, D, EVEN), FOLD)
        acc = dot(x, round_to(linear, FOLD), acc, PRECISION)
    return acc + tl.load(linear_ptr + BLOCK_D * BLOCK_M + BLOCK_D + offs_m)[None, :] * weight_0


@triton.jit
def add_squares(
    squares, x, x_tile, record_ptr, first, D, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EVEN: tl.constexpr,
    GRAM: tl.constexpr,
):  # fmt: skip
    """Squares + the part of x.Z x that a slice of columns of Z gives."""
    offs_d, offs = tl.arange(0, BLOCK_D), tl.arange(0, SLICE)
    gram = tl.load(record_ptr + offs_d[:, None] * BLOCK_D + (first + offs)[None, :])
    row = dot(x, gram, None, GRAM)
    return squares + tl.sum(load_columns(x_tile, first, offs, D, EVEN).to(tl.float32) * row, 1)


@triton.jit
def read_row_sums(
    x_tile, record_ptr, D, weight_0, weight_1, weight_2, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """Row sums l = w0 n + w1 x.z + w2 x.Z x in fp32, a slice of columns of Z at a time to save registers, and how large
    numbers they come from: |w0 n| + |w1 x.z| + |w2| max(x.Z x, |x|^2 tr Z / D). For want of the latter, a row that is
    orthogonal to all keys would seem exact; its x.Z x is a sum of products as large as those of any other x.
    """
    offs_d = tl.arange(0, BLOCK_D)
    x = load_columns(x_tile, 0, offs_d, D, EVEN).to(tl.float32)
    squares = tl.zeros([x.shape[0]], tl.float32)
    # D, not BLOCK_D: slices whose number the compiler knows would be unrolled, and the caller spill registers.
    tl.assume(D > 0)
    for first in tl.range(0, D, SLICE):
        squares = add_squares(squares, x, x_tile, record_ptr, first, D, BLOCK_D, BLOCK_M, EVEN, GRAM)
    sums_ptr = record_ptr + BLOCK_D * (BLOCK_D + BLOCK_M)
    constant = tl.load(sums_ptr + BLOCK_D + BLOCK_M) * weight_0
    linear = tl.sum(x * tl.load(sums_ptr + offs_d)[None, :], 1) * weight_1
    trace = tl.sum(tl.load(record_ptr + offs_d * (BLOCK_D + 1)), 0)
    largest = tl.maximum(tl.abs(squares), tl.sum(x * x, 1) * (trace / D)) * tl.abs(weight_2)
    return constant + linear + squares * weight_2, tl.abs(constant) + tl.abs(linear) + largest


@triton.jit
def pull_record(
    acc, x_tile, y_tile, factor, record_ptr, D, M, weight_1, weight_2, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    EVEN: tl.constexpr, ROW_SUMS: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr,
):  # fmt: skip
    """Add the gradient to x of the terms of degree 1 against y, and `factor` (by row) times that of the row sum; by
    slices as in `read_record`.
    """
    STEP_M: tl.constexpr = SLICE if tl.float32 == FOLD else BLOCK_M
    STEP_D: tl.constexpr = SLICE if tl.float32 == FOLD else BLOCK_D
    offs_d = tl.arange(0, BLOCK_D)
    linear_ptr = record_ptr + BLOCK_D * BLOCK_D
    for first in tl.range(0, BLOCK_M, STEP_M):
        offs = tl.arange(0, STEP_M)
        linear = tl.load(linear_ptr + offs_d[None, :] * BLOCK_M + (first + offs)[:, None]) * weight_1
        y = round_to(load_columns(y_tile, tl.multiple_of(first, STEP_M), offs, M, EVEN), FOLD)
        acc = dot(y, round_to(linear, FOLD), acc, PRECISION)
    if ROW_SUMS:
        row = tl.zeros(acc.shape, tl.float32)
        for first in tl.range(0, BLOCK_D, STEP_D):
            offs = tl.arange(0, STEP_D)
            gram = tl.load(record_ptr + (first + offs)[:, None] * BLOCK_D + offs_d[None, :])
            x = load_columns(x_tile, tl.multiple_of(first, STEP_D), offs, D, EVEN).to(tl.float32)
            row = dot(x, gram, row, GRAM)
        x_sum = tl.load(linear_ptr + BLOCK_D * BLOCK_M + offs_d)
        acc += (row * (2 * weight_2) + (x_sum * weight_1)[None, :]) * factor[:, None]
    return acc
