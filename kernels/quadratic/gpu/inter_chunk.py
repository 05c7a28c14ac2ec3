"""The contribution of earlier chunks: a tile of x times a state S, and its gradient to x.

phi(x) S takes WIDTH columns of x times a slice of 16 at a time; these features exist in registers only. Products carry
twice their weight where a feature stands for x_a x_b and x_b x_a, hence the half on blocks of the diagonal, which hold
both. The gradient contracts the symmetric matrix sum over m of S[i, j, m] y_m with x: dx_j = sum x_i y_m S[i, j, m],
whose factor x_i y_m is formed like a feature.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to

SLICE = tl.constexpr(16)


@triton.jit
def multiply(a, b, DTYPE: tl.constexpr):
    """Return a * b rounded once to DTYPE; fp16 factors may leave their range, so they are multiplied in fp32."""
    if a.dtype == tl.float16:
        a = a.to(tl.float32)
    if b.dtype == tl.float16:
        b = b.to(tl.float32)
    return round_to(a * b, DTYPE)


@triton.jit
def load_columns(tile, first, offs, size, EVEN: tl.constexpr):
    """Load columns first + offs of a tile of tokens. All tokens must exist, and none matters to another."""
    if EVEN:
        return tl.load(tile + first + offs[None, :])
    return tl.load(tile + first + offs[None, :], mask=(first + offs < size)[None, :], other=0.0)


@triton.jit
def accumulate_products(
    acc,
    x_tile,
    products_ptr,
    D,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate acc += phi(x) S over features of degree 2."""
    BLOCK_T: tl.constexpr = acc.shape[0]
    offs_i, offs_j, offs_f = tl.arange(0, WIDTH), tl.arange(0, SLICE), tl.arange(0, WIDTH * SLICE)
    s_tile = products_ptr + offs_f[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    i, j = 0, 0
    for _ in tl.range(0, BLOCK_D * (BLOCK_D // 16 + 1) // 2 // WIDTH):
        xi = load_columns(x_tile, tl.multiple_of(i, WIDTH), offs_i, D, EVEN)
        xj = load_columns(x_tile, tl.multiple_of(j, SLICE), offs_j, D, EVEN)
        xi = xi * tl.where(i >= j, 0.5, 1.0).to(xi.dtype)
        phi = multiply(xi[:, :, None], xj[:, None, :], STATE_DTYPE).reshape(BLOCK_T, WIDTH * SLICE)
        # [BLOCK_T, WIDTH * SLICE] @ [WIDTH * SLICE, BLOCK_DV] -> [BLOCK_T, BLOCK_DV]
        acc = dot(phi, tl.load(s_tile), acc, PRECISION)
        s_tile += WIDTH * SLICE * BLOCK_DV
        i += WIDTH
        beyond = i >= j + SLICE
        j = tl.where(beyond, j + SLICE, j)
        i = tl.where(beyond, 0, i)
    return acc


@triton.jit
def accumulate_products_gradient(
    dx,
    x_tile,
    y_tile,
    products_ptr,
    D,
    M,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate dx += the gradient to x of phi(x) S . y: dx_j += sum over i, m of x_i y_m S[i, j, m]."""
    BLOCK_T: tl.constexpr = dx.shape[0]
    offs_i, offs_m, offs_f = tl.arange(0, WIDTH), tl.arange(0, SLICE), tl.arange(0, WIDTH * SLICE)
    offs_j = tl.arange(0, BLOCK_D)
    A = offs_j // SLICE
    own = A * (A + 1) // 2 * 256 + offs_j % SLICE  # the block row of j, up to its own diagonal; beyond, that of i
    i, m = 0, 0
    for _ in tl.range(0, BLOCK_D // WIDTH * (BLOCK_DV // 16)):
        xi = load_columns(x_tile, tl.multiple_of(i, WIDTH), offs_i, D, EVEN)
        y = load_columns(y_tile, tl.multiple_of(m, SLICE), offs_m, M, EVEN)
        xy = multiply(xi[:, :, None], y[:, None, :], STATE_DTYPE).reshape(BLOCK_T, WIDTH * SLICE)
        I = i // SLICE
        columns = i + offs_f // SLICE
        other = I * (I + 1) // 2 * 256 + offs_j[None, :] * SLICE + columns[:, None] % SLICE
        feature = tl.where((A >= I)[None, :], own[None, :] + columns[:, None] * SLICE, other)
        s = tl.load(products_ptr + feature * BLOCK_DV + tl.multiple_of(m, SLICE) + (offs_f % SLICE)[:, None])
        # [BLOCK_T, WIDTH * SLICE] @ [WIDTH * SLICE, BLOCK_D] -> [BLOCK_T, BLOCK_D]
        dx = dot(xy, s, dx, PRECISION)
        m += SLICE
        beyond = m >= BLOCK_DV
        i = tl.where(beyond, i + WIDTH, i)
        m = tl.where(beyond, 0, m)
    return dx


@triton.jit
def accumulate_moments(
    acc,
    x_tile,
    moments_ptr,
    D,
    weight_0,
    weight_1,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate acc += w1 x (x y^T) + w0 y, the terms of degree 1 and 0. Wide numbers go through shared memory by
    slices, since three TF32 products hold each twice there.
    """
    STEP: tl.constexpr = SLICE if tl.float32 == STATE_DTYPE else BLOCK_D
    offs_d, offs_dv = tl.arange(0, STEP), tl.arange(0, BLOCK_DV)
    linear_ptr = moments_ptr + BLOCK_D * BLOCK_D
    for first in tl.range(0, BLOCK_D, STEP):
        linear = tl.load(linear_ptr + (first + offs_d)[:, None] * BLOCK_DV + offs_dv[None, :]) * weight_1
        x = round_to(load_columns(x_tile, tl.multiple_of(first, STEP), offs_d, D, EVEN), STATE_DTYPE)
        # [BLOCK_T, STEP] @ [STEP, BLOCK_DV] -> [BLOCK_T, BLOCK_DV]
        acc = dot(x, round_to(linear, STATE_DTYPE), acc, PRECISION)
    return acc + tl.load(linear_ptr + BLOCK_D * BLOCK_DV + BLOCK_D + offs_dv)[None, :] * weight_0


@triton.jit
def accumulate_squares(
    squares,
    x,
    x_tile,
    moments_ptr,
    first,
    D,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
):
    """Accumulate squares += x.Z x over a slice of columns of Z."""
    offs_d, offs_j = tl.arange(0, BLOCK_D), tl.arange(0, SLICE)
    gram = tl.load(moments_ptr + offs_d[:, None] * BLOCK_D + (first + offs_j)[None, :])
    # [BLOCK_T, BLOCK_D] @ [BLOCK_D, SLICE] -> [BLOCK_T, SLICE]
    x_gram = dot(x, gram, None, GRAM_PRECISION)
    return squares + tl.sum(load_columns(x_tile, first, offs_j, D, EVEN).to(tl.float32) * x_gram, 1)


@triton.jit
def inter_row_sum(
    x_tile,
    moments_ptr,
    D,
    weight_0,
    weight_1,
    weight_2,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
):
    """Compute l = w0 n + w1 x.z + w2 x.Z x in fp32, a slice of columns of Z at a time to save registers, and how large
    its terms are: |w0 n| + |w1 x.z| + |w2| max(x.Z x, |x|^2 tr Z / D). For want of the latter, a query that is
    orthogonal to all keys would seem exact; its x.Z x is a sum of products as large as those of any other x.
    """
    offs_d = tl.arange(0, BLOCK_D)
    x = load_columns(x_tile, 0, offs_d, D, EVEN).to(tl.float32)
    squares = tl.zeros([x.shape[0]], tl.float32)
    # D, not BLOCK_D: slices whose number the compiler knows would be unrolled, and the caller spill registers.
    tl.assume(D > 0)
    for first in tl.range(0, D, SLICE):
        squares = accumulate_squares(squares, x, x_tile, moments_ptr, first, D, BLOCK_D, EVEN, GRAM_PRECISION)
    sums_ptr = moments_ptr + BLOCK_D * (BLOCK_D + BLOCK_DV)
    constant = tl.load(sums_ptr + BLOCK_D + BLOCK_DV) * weight_0
    linear = tl.sum(x * tl.load(sums_ptr + offs_d)[None, :], 1) * weight_1
    trace = tl.sum(tl.load(moments_ptr + offs_d * (BLOCK_D + 1)), 0)
    largest = tl.maximum(tl.abs(squares), tl.sum(x * x, 1) * (trace / D)) * tl.abs(weight_2)
    return constant + linear + squares * weight_2, tl.abs(constant) + tl.abs(linear) + largest


@triton.jit
def accumulate_moments_gradient(
    dx,
    x_tile,
    y_tile,
    factor,
    moments_ptr,
    D,
    M,
    weight_1,
    weight_2,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    ROW_SUM: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
):
    """Accumulate dx += w1 y (x y^T)^T, the gradient to x of the terms of degree 1 against y, and if ROW_SUM `factor`
    (by token) times that of the row sum, w1 z + 2 w2 x Z; by slices as in `accumulate_moments`.
    """
    STEP_DV: tl.constexpr = SLICE if tl.float32 == STATE_DTYPE else BLOCK_DV
    STEP_D: tl.constexpr = SLICE if tl.float32 == STATE_DTYPE else BLOCK_D
    offs_d = tl.arange(0, BLOCK_D)
    linear_ptr = moments_ptr + BLOCK_D * BLOCK_D
    for first in tl.range(0, BLOCK_DV, STEP_DV):
        offs_m = tl.arange(0, STEP_DV)
        linear = tl.load(linear_ptr + offs_d[None, :] * BLOCK_DV + (first + offs_m)[:, None]) * weight_1
        y = round_to(load_columns(y_tile, tl.multiple_of(first, STEP_DV), offs_m, M, EVEN), STATE_DTYPE)
        # [BLOCK_T, STEP_DV] @ [STEP_DV, BLOCK_D] -> [BLOCK_T, BLOCK_D]
        dx = dot(y, round_to(linear, STATE_DTYPE), dx, PRECISION)
    if ROW_SUM:
        x_gram = tl.zeros(dx.shape, tl.float32)
        for first in tl.range(0, BLOCK_D, STEP_D):
            offs_i = tl.arange(0, STEP_D)
            gram = tl.load(moments_ptr + (first + offs_i)[:, None] * BLOCK_D + offs_d[None, :])
            x = load_columns(x_tile, tl.multiple_of(first, STEP_D), offs_i, D, EVEN).to(tl.float32)
            # [BLOCK_T, STEP_D] @ [STEP_D, BLOCK_D] -> [BLOCK_T, BLOCK_D]
            x_gram = dot(x, gram, x_gram, GRAM_PRECISION)
        x_sum = tl.load(linear_ptr + BLOCK_D * BLOCK_DV + offs_d)
        dx += (x_gram * (2 * weight_2) + (x_sum * weight_1)[None, :]) * factor[:, None]
    return dx
