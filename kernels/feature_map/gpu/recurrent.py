"""Token by token: the state stays in registers, is updated by each key and read by each row. With one token this is a
step of decoding: one pass over the state, read, updated, read out and written.
"""

import triton
import triton.language as tl

from linattn.kernels.feature_map.gpu.layout import bounds, clamped
from linattn.kernels.feature_map.gpu.maps import feature


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def walk(
    q_ptr, k_ptr, v_ptr, out_ptr, l_ptr, key_mask_ptr, cu_seqlens_ptr,
    first_total_ptr, first_ptr, last_total_ptr, last_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_mb,
    Hkv, Tq, Tk, q_offset, scale,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M columns of the state of one key head, in fp32 throughout."""
    M_SLICES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    offs_m = pid % M_SLICES * BLOCK_M + tl.arange(0, BLOCK_M)
    h = pid // M_SLICES % Hkv
    s = pid // M_SLICES // Hkv
    offs_d = tl.arange(0, BLOCK_D)
    in_d, in_m = offs_d < D, offs_m < M
    b = (s * 0 if PACKED else s).to(tl.int64)
    row_stride = Tq  # of l
    start, Tq, Tk = bounds(s, cu_seqlens_ptr, Tq, Tk, PACKED)
    offset = clamped(q_offset, Tq, Tk, True)
    k_ptr += b * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + h.to(tl.int64) * stride_vh

    at = (s * Hkv + h).to(tl.int64)
    tile = at * (D * M) + offs_d[:, None] * M + offs_m[None, :]
    if HAS_FIRST:
        S = tl.load(first_ptr + tile, mask=in_d[:, None] & in_m[None, :], other=0.0)
        z = tl.load(first_total_ptr + at * D + offs_d, mask=in_d, other=0.0)
    else:
        S = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        z = tl.zeros([BLOCK_D], tl.float32)

    for position in range(tl.minimum(offset, 0), tl.maximum(Tk, Tq + offset)):
        j = (start + position).to(tl.int64)
        seen = (position >= 0) & (position < Tk)
        if MASKED:
            seen &= tl.load(key_mask_ptr + b * stride_mb + j, mask=seen, other=0) != 0
        k = tl.load(k_ptr + j * stride_kt + offs_d, mask=offs_d < tl.where(seen, D, 0), other=0.0).to(tl.float32)
        v = tl.load(v_ptr + j * stride_vt + offs_m, mask=offs_m < tl.where(seen, M, 0), other=0.0).to(tl.float32)
        f = tl.where(offs_d < tl.where(seen, D, 0), feature(k, MAP), 0.0)
        S += f[:, None] * v[None, :]
        z += f
        i = (start + position - offset).to(tl.int64)
        is_row = (position >= offset) & (position < offset + Tq)
        for g in range(G):
            head = (h * G + g).to(tl.int64)
            q = q_ptr + b * stride_qb + head * stride_qh + i * stride_qt
            q = tl.load(q + offs_d, mask=offs_d < tl.where(is_row, D, 0), other=0.0).to(tl.float32)
            x = tl.where(in_d, scale * feature(q, MAP), 0.0)
            acc = tl.sum(x[:, None] * S, 0)
            l = tl.sum(x * z, 0)
            if NORMALIZE:
                acc = acc / tl.where(l <= 0, float("inf"), l)
            out = out_ptr + b * stride_ob + head * stride_oh + i * stride_ot
            tl.store(out + offs_m, acc.to(out_ptr.dtype.element_ty), mask=offs_m < tl.where(is_row, M, 0))
            tl.store(l_ptr + (b * Hkv * G + head) * row_stride + i, l, mask=is_row & (pid % M_SLICES == 0))

    if HAS_LAST:
        tl.store(last_ptr + tile, S, mask=in_d[:, None] & in_m[None, :])
        tl.store(last_total_ptr + at * D + offs_d, z, mask=offs_d < tl.where(pid % M_SLICES == 0, D, 0))
