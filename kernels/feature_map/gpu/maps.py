"""phi and its slope on tiles (definitions: kernels/feature_map/maps.py), and how rows become features: within the
kernels of the chunked form, or beforehand for the direct form.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import round_to


@triton.jit
def feature(x, MAP: tl.constexpr):
    """phi(x) for an fp32 tile. NaN stays NaN."""
    if MAP == "elu+1":
        return tl.where(x > 0, x + 1, tl.exp(x))
    if MAP == "relu":
        return tl.where(x <= 0, 0.0, x)
    if MAP == "relu2":
        x = tl.where(x <= 0, 0.0, x)
        return x * x
    if MAP == "exp":
        return tl.exp(x)
    return x


@triton.jit
def slope(x, MAP: tl.constexpr):
    """phi'(x) for an fp32 tile."""
    if MAP == "elu+1":
        return tl.where(x > 0, 1.0, tl.exp(x))
    if MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    if MAP == "relu2":
        return 2 * tl.where(x <= 0, 0.0, x)
    if MAP == "exp":
        return tl.exp(x)
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def inside(offs_c, kept, SIZE: tl.constexpr):
    """Which entries of a tile exist: rows that are kept, columns below SIZE (0: all of them)."""
    if SIZE == 0:
        return kept[:, None]
    return kept[:, None] & (offs_c < SIZE)[None, :]


@triton.jit
def load_rows(pointer, first, stride, offs_t, offs_c, kept, SIZE: tl.constexpr):
    """Rows first + offs_t and columns offs_c of a matrix; 0 where they are not inside."""
    at = pointer + first.to(tl.int64) * stride + offs_t[:, None] * stride + offs_c[None, :]
    return tl.load(at, mask=inside(offs_c, kept, SIZE), other=0.0)


@triton.jit
def store_rows(pointer, first, stride, offs_t, offs_c, kept, SIZE: tl.constexpr, x):
    at = pointer + first.to(tl.int64) * stride + offs_t[:, None] * stride + offs_c[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=inside(offs_c, kept, SIZE))


@triton.jit
def key_features(k, kept, offs_c, SIZE: tl.constexpr, MAP: tl.constexpr, LOW: tl.constexpr):
    """Phi of loaded keys; 0 where a key is not kept, for phi(0) may be 1."""
    if MAP == "identity":
        return operand(k, LOW)
    f = feature(k.to(tl.float32), MAP)
    return round_to(tl.where(inside(offs_c, kept, SIZE), f, 0.0), LOW)


@triton.jit
def query_features(q, scale, offs_c, SIZE: tl.constexpr, MAP: tl.constexpr, LOW: tl.constexpr):
    """Scale * phi of loaded queries."""
    f = scale * feature(q.to(tl.float32), MAP)
    if SIZE > 0:
        f = tl.where((offs_c < SIZE)[None, :], f, 0.0)
    return round_to(f, LOW)


@triton.jit
def operand(x, LOW: tl.constexpr):
    """Loaded numbers as a factor of a product: fp16 is multiplied as fp32."""
    if tl.float32 == LOW:
        return x.to(tl.float32)
    return x


@triton.jit
def map_rows(
    q_ptr, k_ptr, fq_ptr, fk_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_fqb, stride_fqh, stride_fqt, stride_fkb, stride_fkh, stride_fkt,
    H, Hkv, Tq, Tk, q_programs,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Phi of queries and of keys. One program: a tile of rows of either."""
    pid = tl.program_id(0)
    if pid < q_programs:
        _map_tile(
            q_ptr, fq_ptr, stride_qb, stride_qh, stride_qt, stride_fqb, stride_fqh, stride_fqt,
            pid, H, Tq, D, BLOCK_T, BLOCK_D, MAP, LOW,
        )  # fmt: skip
    else:
        _map_tile(
            k_ptr, fk_ptr, stride_kb, stride_kh, stride_kt, stride_fkb, stride_fkh, stride_fkt,
            pid - q_programs, Hkv, Tk, D, BLOCK_T, BLOCK_D, MAP, LOW,
        )  # fmt: skip


@triton.jit
def _map_tile(
    x_ptr, f_ptr, stride_xb, stride_xh, stride_xt, stride_fb, stride_fh, stride_ft,
    tile, H, T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, MAP: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_T)
    first = tile % tiles * BLOCK_T
    h, b = (tile // tiles % H).to(tl.int64), (tile // tiles // H).to(tl.int64)
    offs_t, offs_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    kept = first + offs_t < T
    x = load_rows(x_ptr + b * stride_xb + h * stride_xh, first, stride_xt, offs_t, offs_d, kept, D)
    f = round_to(feature(x.to(tl.float32), MAP), LOW)
    store_rows(f_ptr + b * stride_fb + h * stride_fh, first, stride_ft, offs_t, offs_d, kept, D, f)
