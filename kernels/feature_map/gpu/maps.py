"""phi and its slope on tiles (definitions: kernels/feature_map/maps.py), and how q and k become features: within the
kernels of the chunked form, or beforehand for the direct form.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.mainloop import load_tile
from linattn.kernels.common.gpu.numerics import round_to


@triton.jit
def feature(x, MAP: tl.constexpr):
    """Compute phi(x) for an fp32 tile. NaN stays NaN."""
    if MAP == "elu+1":
        return tl.where(x > 0, x + 1, tl.exp(x))
    elif MAP == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif MAP == "relu2":
        x = tl.where(x <= 0, 0.0, x)
        return x * x
    elif MAP == "exp":
        return tl.exp(x)
    else:
        return x


@triton.jit
def slope(x, MAP: tl.constexpr):
    """Compute phi'(x) for an fp32 tile."""
    if MAP == "elu+1":
        return tl.where(x > 0, 1.0, tl.exp(x))
    elif MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif MAP == "relu2":
        return 2 * tl.where(x <= 0, 0.0, x)
    elif MAP == "exp":
        return tl.exp(x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def inside(mask, offs_d, SIZE: tl.constexpr):
    """Return which entries of a tile exist: tokens of `mask`, columns below SIZE (0: all of them)."""
    if SIZE == 0:
        return mask[:, None]
    else:
        return mask[:, None] & (offs_d < SIZE)[None, :]


@triton.jit
def load_slice(ptr, first, stride, mask, offs_t, offs_d, SIZE: tl.constexpr):
    """Load tokens first + offs_t and columns offs_d of a matrix; 0 where they are not `inside`."""
    return load_tile(ptr, first, stride, mask, offs_t, offs_d, SIZE, MASKED=True, EVEN=SIZE == 0)


@triton.jit
def store_slice(ptr, first, stride, mask, offs_t, offs_d, SIZE: tl.constexpr, x):
    """Store what `load_slice` would load."""
    tile = ptr + first.to(tl.int64) * stride + (offs_t[:, None] * stride + offs_d[None, :])
    tl.store(tile, x.to(ptr.dtype.element_ty), mask=inside(mask, offs_d, SIZE))


@triton.jit
def as_factor(x, PRODUCT_DTYPE: tl.constexpr):
    """Convert loaded numbers to a factor of a product: fp16 is multiplied as fp32."""
    if tl.float32 == PRODUCT_DTYPE:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def load_key_features(
    k_ptr, first, stride_kt, mask, offs_t, offs_d, SIZE: tl.constexpr, MAP: tl.constexpr, PRODUCT_DTYPE: tl.constexpr
):
    """Load phi(k); 0 where a key does not count, for phi(0) may be 1."""
    k = load_slice(k_ptr, first, stride_kt, mask, offs_t, offs_d, SIZE)
    if MAP == "identity":
        return as_factor(k, PRODUCT_DTYPE)
    else:
        f = feature(k.to(tl.float32), MAP)
        return round_to(tl.where(inside(mask, offs_d, SIZE), f, 0.0), PRODUCT_DTYPE)


@triton.jit
def load_query_features(
    q_ptr,
    first,
    stride_qt,
    scale,
    mask,
    offs_t,
    offs_d,
    SIZE: tl.constexpr,
    MAP: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
):
    """Load x = scale phi(q)."""
    q = load_slice(q_ptr, first, stride_qt, mask, offs_t, offs_d, SIZE)
    x = scale * feature(q.to(tl.float32), MAP)
    if SIZE > 0:
        x = tl.where((offs_d < SIZE)[None, :], x, 0.0)
    return round_to(x, PRODUCT_DTYPE)


@triton.jit
def load_values(v_ptr, first, stride_vt, mask, offs_t, offs_dv, SIZE: tl.constexpr, PRODUCT_DTYPE: tl.constexpr):
    """Load v as a factor of a product."""
    return as_factor(load_slice(v_ptr, first, stride_vt, mask, offs_t, offs_dv, SIZE), PRODUCT_DTYPE)


@triton.jit
def map_features_kernel(
    q_ptr,
    k_ptr,
    fq_ptr,
    fk_ptr,
    stride_q,
    stride_k,
    stride_fq,
    stride_fk,
    H,
    Hkv,
    Tq,
    Tk,
    num_query_tiles,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAP: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    """Compute fq = phi(q), fk = phi(k). One program: a tile of tokens of either."""
    pid = tl.program_id(0)
    if pid < num_query_tiles:
        map_tile(q_ptr, fq_ptr, stride_q, stride_fq, pid, H, Tq, D, BLOCK_T, BLOCK_D, MAP, IN_DTYPE)
    else:
        map_tile(k_ptr, fk_ptr, stride_k, stride_fk, pid - num_query_tiles, Hkv, Tk, D, BLOCK_T, BLOCK_D, MAP, IN_DTYPE)


@triton.jit
def map_tile(
    x_ptr,
    f_ptr,
    stride_x,
    stride_f,
    tile,
    H,
    T,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAP: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    """Compute f = phi(x) for one tile of BLOCK_T tokens of one head."""
    stride_xb, stride_xh, stride_xt = stride_x
    stride_fb, stride_fh, stride_ft = stride_f
    tiles = tl.cdiv(T, BLOCK_T)
    first = tile % tiles * BLOCK_T
    h, b = (tile // tiles % H).to(tl.int64), (tile // tiles // H).to(tl.int64)
    offs_t, offs_d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    mask_t = first + offs_t < T
    x = load_slice(x_ptr + b * stride_xb + h * stride_xh, first, stride_xt, mask_t, offs_t, offs_d, D)
    f = round_to(feature(x.to(tl.float32), MAP), IN_DTYPE)
    store_slice(f_ptr + b * stride_fb + h * stride_fh, first, stride_ft, mask_t, offs_t, offs_d, D, f)
