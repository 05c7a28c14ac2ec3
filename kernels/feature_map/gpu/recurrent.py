"""Token by token: the state stays in registers, is updated by each key and multiplied by each query. With one token
this is a step of decoding: one pass over the state, which is loaded, updated, multiplied and stored.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.varlen_schedule import bounds_of
from linattn.kernels.feature_map.gpu.chunk_schedule import clamp_offset
from linattn.kernels.feature_map.gpu.maps import feature


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def recurrent_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    l_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    initial_S_ptr,
    initial_z_ptr,
    final_S_ptr,
    final_z_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_mb,
    Hkv,
    Tq,
    Tk,
    q_offset,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):
    """Compute S_j = S_(j-1) + phi(k_j) v_j^T, z_j = z_(j-1) + phi(k_j), o_i = x_i S / x_i z with x = scale phi(q).

    One program: BLOCK_DV columns of the state of one key head, in fp32 throughout.
    """
    # Over 60 lines: the signature. One program keeps S in registers from the first token to the last.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    M_SLICES: tl.constexpr = (M + BLOCK_DV - 1) // BLOCK_DV
    pid = tl.program_id(0)
    offs_dv = pid % M_SLICES * BLOCK_DV + tl.arange(0, BLOCK_DV)
    h = pid // M_SLICES % Hkv
    s = pid // M_SLICES // Hkv
    offs_d = tl.arange(0, BLOCK_D)
    mask_d, mask_dv = offs_d < D, offs_dv < M
    b = (s * 0 if PACKED else s).to(tl.int64)
    stride_lh = Tq
    start, Tq = bounds_of(s, cu_seqlens_ptr, Tq, PACKED)
    Tk = Tq if PACKED else Tk
    offset = clamp_offset(q_offset, Tq, Tk, True)
    k_ptr += b * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + h.to(tl.int64) * stride_vh

    n = (s * Hkv + h).to(tl.int64)
    tile = n * (D * M) + offs_d[:, None] * M + offs_dv[None, :]
    if HAS_INITIAL:
        S = tl.load(initial_S_ptr + tile, mask=mask_d[:, None] & mask_dv[None, :], other=0.0)
        z = tl.load(initial_z_ptr + n * D + offs_d, mask=mask_d, other=0.0)
    else:
        S = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
        z = tl.zeros([BLOCK_D], tl.float32)

    for position in range(tl.minimum(offset, 0), tl.maximum(Tk, Tq + offset)):
        j = (start + position).to(tl.int64)
        is_key = (position >= 0) & (position < Tk)
        if MASKED:
            is_key &= tl.load(key_mask_ptr + b * stride_mb + j, mask=is_key, other=0) != 0
        k = tl.load(k_ptr + j * stride_kt + offs_d, mask=offs_d < tl.where(is_key, D, 0), other=0.0).to(tl.float32)
        v = tl.load(v_ptr + j * stride_vt + offs_dv, mask=offs_dv < tl.where(is_key, M, 0), other=0.0).to(tl.float32)
        f = tl.where(offs_d < tl.where(is_key, D, 0), feature(k, MAP), 0.0)
        S += f[:, None] * v[None, :]
        z += f
        i = (start + position - offset).to(tl.int64)
        is_query = (position >= offset) & (position < offset + Tq)
        for g in range(GROUP):
            head = (h * GROUP + g).to(tl.int64)
            q = q_ptr + b * stride_qb + head * stride_qh + i * stride_qt
            q = tl.load(q + offs_d, mask=offs_d < tl.where(is_query, D, 0), other=0.0).to(tl.float32)
            x = tl.where(mask_d, scale * feature(q, MAP), 0.0)
            acc = tl.sum(x[:, None] * S, 0)
            l = tl.sum(x * z, 0)
            if NORMALIZE:
                acc = acc / tl.where(l <= 0, float("inf"), l)
            o = o_ptr + b * stride_ob + head * stride_oh + i * stride_ot
            tl.store(o + offs_dv, acc.to(o_ptr.dtype.element_ty), mask=offs_dv < tl.where(is_query, M, 0))
            tl.store(l_ptr + (b * Hkv * GROUP + head) * stride_lh + i, l, mask=is_query & (pid % M_SLICES == 0))

    if HAS_FINAL:
        tl.store(final_S_ptr + tile, S, mask=mask_d[:, None] & mask_dv[None, :])
        tl.store(final_z_ptr + n * D + offs_d, z, mask=offs_d < tl.where(pid % M_SLICES == 0, D, 0))
