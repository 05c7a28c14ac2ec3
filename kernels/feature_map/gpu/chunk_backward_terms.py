"""The terms of dq, dk and dv of one chunk: the scores inside it (intra), the states before and after it (inter).

Names and formulas: chunk_backward.py. Sides that are summed over are loaded in slices of BLOCK_C.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.feature_map.gpu.chunk_state import load_dout_scaled
from linattn.kernels.feature_map.gpu.maps import load_key_features, load_query_features, load_slice, load_values


@triton.jit
def recompute_dscores(
    v,
    v_ptr,
    dout_ptr,
    o_ptr,
    l_ptr,
    first_query,
    first_key,
    stride_vt,
    stride_dot,
    stride_ot,
    mask_t,
    mask_n,
    visible,
    offs_t,
    offs,
    M: tl.constexpr,
    M_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEEDED: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute dA^T = V O^T - delta where visible, if NEEDED; the first slice of O; delta. v: the first slice of V."""
    # Over 60 lines: three argument lists.
    dA = tl.zeros([v.shape[0], v.shape[0]], tl.float32)
    O, delta = load_dout_scaled(
        dout_ptr,
        o_ptr,
        l_ptr,
        first_query,
        stride_dot,
        stride_ot,
        mask_t,
        offs_t,
        offs,
        M_MASK,
        NORMALIZE,
        PRODUCT_DTYPE,
    )
    if NEEDED:
        # [CHUNK, BLOCK_C] @ [BLOCK_C, CHUNK] -> [CHUNK, CHUNK]
        dA = dot(v, tl.trans(O), dA, PRECISION)
    for m in range(1, (M + BLOCK_C - 1) // BLOCK_C):
        offs_m = m * BLOCK_C + offs
        v_m = load_values(v_ptr, first_key, stride_vt, mask_n, offs_t, offs_m, M_MASK, PRODUCT_DTYPE)
        O_m, delta_m = load_dout_scaled(
            dout_ptr,
            o_ptr,
            l_ptr,
            first_query,
            stride_dot,
            stride_ot,
            mask_t,
            offs_t,
            offs_m,
            SIZE=M_MASK,
            NORMALIZE=NORMALIZE,
            PRODUCT_DTYPE=PRODUCT_DTYPE,
        )
        delta += delta_m
        if NEEDED:
            # [CHUNK, BLOCK_C] @ [BLOCK_C, CHUNK] -> [CHUNK, CHUNK]
            dA = dot(v_m, tl.trans(O_m), dA, PRECISION)
    if NEEDED:
        dA = round_to(tl.where(visible, dA - delta[None, :], 0.0), PRODUCT_DTYPE)
    return dA, O, delta


@triton.jit
def accumulate_dq_inter(
    dx,
    O,
    delta,
    dout_ptr,
    o_ptr,
    l_ptr,
    S_ptr,
    z_ptr,
    n,
    first_query,
    stride_dot,
    stride_ot,
    mask_t,
    offs_t,
    offs,
    offs_c,
    D: tl.constexpr,
    M: tl.constexpr,
    M_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dx += O S^T - delta z for the n-th state. O: its first slice."""
    S = load_slice(S_ptr, n * D, M, offs_c < D, offs_c, offs, M_MASK)
    # [CHUNK, BLOCK_C] @ [BLOCK_C, BLOCK_C] -> [CHUNK, BLOCK_C]
    dx = dot(O, tl.trans(S), dx, PRECISION)
    for m in range(1, (M + BLOCK_C - 1) // BLOCK_C):
        offs_m = m * BLOCK_C + offs
        O_m, _ = load_dout_scaled(
            dout_ptr,
            o_ptr,
            l_ptr,
            first_query,
            stride_dot,
            stride_ot,
            mask_t,
            offs_t,
            offs_m,
            SIZE=M_MASK,
            NORMALIZE=NORMALIZE,
            PRODUCT_DTYPE=PRODUCT_DTYPE,
        )
        S = load_slice(S_ptr, n * D, M, offs_c < D, offs_c, offs_m, M_MASK)
        # [CHUNK, BLOCK_C] @ [BLOCK_C, BLOCK_C] -> [CHUNK, BLOCK_C]
        dx = dot(O_m, tl.trans(S), dx, PRECISION)
    if NORMALIZE:
        z = tl.load(z_ptr + n * D + offs_c, mask=offs_c < D, other=0.0)
        dx -= delta[:, None] * z[None, :]
    return dx


@triton.jit
def recompute_scores(
    q_ptr,
    k_ptr,
    first_query,
    first_key,
    stride_qt,
    stride_kt,
    scale,
    mask_t,
    mask_n,
    offs_t,
    offs,
    D: tl.constexpr,
    D_MASK: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAP: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute P^T = phi(K) x^T, in slices of BLOCK_C features."""
    p = tl.zeros([CHUNK, CHUNK], tl.float32)
    for d in range((D + BLOCK_C - 1) // BLOCK_C):
        offs_d = d * BLOCK_C + offs
        x = load_query_features(
            q_ptr, first_query, stride_qt, scale, mask_t, offs_t, offs_d, D_MASK, MAP, PRODUCT_DTYPE
        )
        f = load_key_features(k_ptr, first_key, stride_kt, mask_n, offs_t, offs_d, D_MASK, MAP, PRODUCT_DTYPE)
        # [CHUNK, BLOCK_C] @ [BLOCK_C, CHUNK] -> [CHUNK, CHUNK]
        p = dot(f, tl.trans(x), p, PRECISION)
    return p


@triton.jit
def accumulate_dv_inter(
    dv,
    f,
    k_ptr,
    dS_ptr,
    n,
    first_key,
    stride_kt,
    mask_n,
    offs_t,
    offs,
    offs_c,
    D: tl.constexpr,
    M: tl.constexpr,
    D_MASK: tl.constexpr,
    M_MASK: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAP: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dv += phi(K) dS for the n-th state gradient. f: phi(K), if it is one slice."""
    if SLICES == 1:
        dS = load_slice(dS_ptr, n * D, M, offs < D, offs, offs_c, M_MASK)
        # [CHUNK, BLOCK_C] @ [BLOCK_C, BLOCK_C] -> [CHUNK, BLOCK_C]
        dv = dot(f, dS, dv, PRECISION)
    else:
        for d in range((D + BLOCK_C - 1) // BLOCK_C):
            offs_d = d * BLOCK_C + offs
            f_d = load_key_features(k_ptr, first_key, stride_kt, mask_n, offs_t, offs_d, D_MASK, MAP, PRODUCT_DTYPE)
            dS = load_slice(dS_ptr, n * D, M, offs_d < D, offs_d, offs_c, M_MASK)
            # [CHUNK, BLOCK_C] @ [BLOCK_C, BLOCK_C] -> [CHUNK, BLOCK_C]
            dv = dot(f_d, dS, dv, PRECISION)
    return dv


@triton.jit
def accumulate_dk_inter(
    dk,
    v,
    v_ptr,
    dS_ptr,
    dz_ptr,
    n,
    first_key,
    stride_vt,
    mask_n,
    offs_t,
    offs,
    offs_c,
    D: tl.constexpr,
    M: tl.constexpr,
    M_MASK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dk += V dS^T + dz for the n-th state gradient. v: the first slice of V."""
    dS = load_slice(dS_ptr, n * D, M, offs_c < D, offs_c, offs, M_MASK)
    # [CHUNK, BLOCK_C] @ [BLOCK_C, BLOCK_C] -> [CHUNK, BLOCK_C]
    dk = dot(v, tl.trans(dS), dk, PRECISION)
    for m in range(1, (M + BLOCK_C - 1) // BLOCK_C):
        offs_m = m * BLOCK_C + offs
        v_m = load_values(v_ptr, first_key, stride_vt, mask_n, offs_t, offs_m, M_MASK, PRODUCT_DTYPE)
        dS = load_slice(dS_ptr, n * D, M, offs_c < D, offs_c, offs_m, M_MASK)
        # [CHUNK, BLOCK_C] @ [BLOCK_C, BLOCK_C] -> [CHUNK, BLOCK_C]
        dk = dot(v_m, tl.trans(dS), dk, PRECISION)
    return dk + tl.load(dz_ptr + n * D + offs_c, mask=offs_c < D, other=0.0)[None, :]
