"""Backward: dq, dk and dv of one chunk, from the states before it, the gradients to the states after it and the scores
inside it.

    dx = O S^T - delta z + dA phi(K)       dphi(K) = V dS^T + dz + dA^T x       dV = phi(K) dS + P^T O

with x = scale phi(q), O = dout / l, delta = O.out. Tiles of scores are computed transposed, P^T and dA^T
`[keys, queries]`, so that the products for the keys take them from registers. One program makes BLOCK_C columns of all
three; the sides that are summed over are loaded in slices of BLOCK_C too.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.feature_map.gpu.chunk_backward_terms import (
    accumulate_dk_inter,
    accumulate_dq_inter,
    accumulate_dv_inter,
    recompute_dscores,
    recompute_scores,
)
from linattn.kernels.feature_map.gpu.chunk_schedule import locate_chunk, locate_states, nth_state, splits_before
from linattn.kernels.feature_map.gpu.chunk_state import load_dout_scaled
from linattn.kernels.feature_map.gpu.maps import (
    load_key_features,
    load_query_features,
    load_slice,
    load_values,
    slope,
    store_slice,
)


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def chunk_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    dout_ptr,
    l_ptr,
    key_mask_ptr,
    cu_seqlens_ptr,
    S_ptr,
    z_ptr,
    dS_ptr,
    dz_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
    stride_dk,
    stride_dv,
    stride_mb,
    num_tiles,
    NUM_SEQS,
    Hkv,
    Tq,
    Tk,
    q_offset,
    TILES_PER_NUMBER,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY_SPLITS: tl.constexpr,
    QUERY_SPLITS: tl.constexpr,
    NEEDS_DQ: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    MAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    PRODUCT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dq = scale phi'(q) dx, dk = phi'(k) dphi(k) and dv, as above: BLOCK_C columns of a chunk and key head."""
    # Long because the accumulators stay in registers for all of one pass.
    # Over 60 lines: the signature, and one program keeps dk and dv in registers over the query heads that share them.
    stride_qb, stride_qh, stride_qt = stride_q
    stride_kb, stride_kh, stride_kt = stride_k
    stride_vb, stride_vh, stride_vt = stride_v
    stride_ob, stride_oh, stride_ot = stride_o
    stride_dob, stride_doh, stride_dot = stride_do
    stride_dqb, stride_dqh, stride_dqt = stride_dq
    stride_dkb, stride_dkh, stride_dkt = stride_dk
    stride_dvb, stride_dvh, stride_dvt = stride_dv
    D_SLICES: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    M_SLICES: tl.constexpr = (M + BLOCK_C - 1) // BLOCK_C
    SLICES: tl.constexpr = max(D_SLICES, M_SLICES)
    UNEVEN: tl.constexpr = D % BLOCK_C > 0 or M % BLOCK_C > 0 or D_SLICES != M_SLICES
    D_MASK: tl.constexpr = D if UNEVEN else 0
    M_MASK: tl.constexpr = M if UNEVEN else 0
    pid = tl.program_id(0)
    offs_c = pid % SLICES * BLOCK_C + tl.arange(0, BLOCK_C)  # the columns this program makes
    tile = pid // SLICES % num_tiles
    h = pid // SLICES // num_tiles % Hkv
    b = pid // SLICES // num_tiles // Hkv
    offs = tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, CHUNK)
    stride_lh = Tq
    s, r, start, Tq, Tk, offset = locate_chunk(
        tile, b, cu_seqlens_ptr, NUM_SEQS, Tq, Tk, q_offset, TILES_PER_NUMBER, CHUNK, PACKED, IS_CAUSAL, FROM_KEYS=True
    )
    first_query, first_key = r * CHUNK - offset, r * CHUNK
    if (first_query >= Tq) & (first_key >= Tk):
        return
    mask_t = (first_query + offs_t >= 0) & (first_query + offs_t < Tq)
    exists_n = (first_key + offs_t >= 0) & (first_key + offs_t < Tk)
    mask_n = exists_n
    if MASKED:
        key_mask_ptr += b.to(tl.int64) * stride_mb + start + first_key
        mask_n &= tl.load(key_mask_ptr + offs_t, mask=exists_n, other=0) != 0
    first_query += start
    first_key += start
    visible = (offs_t[:, None] <= offs_t[None, :]) & mask_n[:, None] & mask_t[None, :]
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    f = load_key_features(k_ptr, first_key, stride_kt, mask_n, offs_t, offs_c, D_MASK, MAP, PRODUCT_DTYPE)
    v = load_values(v_ptr, first_key, stride_vt, mask_n, offs_t, offs, M_MASK, PRODUCT_DTYPE)
    dk = tl.zeros([CHUNK, BLOCK_C], tl.float32)
    dv = tl.zeros([CHUNK, BLOCK_C], tl.float32)

    for g in range(GROUP):
        head = h * GROUP + g
        q_head = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        o_head = o_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        dout_head = dout_ptr + b.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
        l_head = l_ptr + (b * Hkv * GROUP + head).to(tl.int64) * stride_lh
        x = load_query_features(
            q_head, first_query, stride_qt, scale, mask_t, offs_t, offs_c, D_MASK, MAP, PRODUCT_DTYPE
        )
        dA, O, delta = recompute_dscores(
            v,
            v_ptr,
            dout_head,
            o_head,
            l_head,
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
            M=M,
            M_MASK=M_MASK,
            BLOCK_C=BLOCK_C,
            NORMALIZE=NORMALIZE,
            NEEDED=IS_CAUSAL and (NEEDS_DQ or NEEDS_DK),
            PRODUCT_DTYPE=PRODUCT_DTYPE,
            PRECISION=PRECISION,
        )

        if NEEDS_DQ:
            dx = tl.zeros([CHUNK, BLOCK_C], tl.float32)
            base, chunks = locate_states(s, start, Tk, CHUNK, KEY_SPLITS, PACKED, IS_CAUSAL)
            c = tl.maximum(r, 0) if IS_CAUSAL else chunks
            before = splits_before(c, chunks, KEY_SPLITS, REVERSED=False)
            for i in range(1 if KEY_SPLITS == 1 else before + 1):
                n = (base + nth_state(i, before, c, chunks, KEY_SPLITS, REVERSED=False)).to(tl.int64) * Hkv + h
                dx = accumulate_dq_inter(
                    dx,
                    O,
                    delta,
                    dout_head,
                    o_head,
                    l_head,
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
                    D=D,
                    M=M,
                    M_MASK=M_MASK,
                    BLOCK_C=BLOCK_C,
                    NORMALIZE=NORMALIZE,
                    PRODUCT_DTYPE=PRODUCT_DTYPE,
                    PRECISION=PRECISION,
                )
            if IS_CAUSAL:
                # [CHUNK, CHUNK] @ [CHUNK, BLOCK_C] -> [CHUNK, BLOCK_C]
                dx = dot(tl.trans(dA), f, dx, PRECISION)
            dx *= scale
            if MAP != "identity":
                q = load_slice(
                    q_head, first_query, stride_qt, mask_t, offs_t, offs_c, D_MASK
                )  # again: registers are scarce
                dx *= slope(q.to(tl.float32), MAP)
            dq_head = dq_ptr + b.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
            store_slice(dq_head, first_query, stride_dqt, mask_t, offs_t, offs_c, D_MASK, dx)

        if NEEDS_DK and IS_CAUSAL:
            # [CHUNK, CHUNK] @ [CHUNK, BLOCK_C] -> [CHUNK, BLOCK_C]
            dk = dot(dA, x, dk, PRECISION)
        if NEEDS_DV and IS_CAUSAL:
            if SLICES == 1:
                # [CHUNK, BLOCK_C] @ [BLOCK_C, CHUNK] -> [CHUNK, CHUNK]
                p = dot(f, tl.trans(x), tl.zeros([CHUNK, CHUNK], tl.float32), PRECISION)
            else:
                p = recompute_scores(
                    q_head,
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
                    D=D,
                    D_MASK=D_MASK,
                    CHUNK=CHUNK,
                    BLOCK_C=BLOCK_C,
                    MAP=MAP,
                    PRODUCT_DTYPE=PRODUCT_DTYPE,
                    PRECISION=PRECISION,
                )
                O, _ = load_dout_scaled(
                    dout_head,
                    o_head,
                    l_head,
                    first_query,
                    stride_dot,
                    stride_ot,
                    mask_t,
                    offs_t,
                    offs_c,
                    SIZE=M_MASK,
                    NORMALIZE=NORMALIZE,
                    PRODUCT_DTYPE=PRODUCT_DTYPE,
                )
            # [CHUNK, CHUNK] @ [CHUNK, BLOCK_C] -> [CHUNK, BLOCK_C]
            dv = dot(round_to(tl.where(visible, p, 0.0), PRODUCT_DTYPE), O, dv, PRECISION)

    if NEEDS_DK or NEEDS_DV:  # from the queries of later chunks
        base, chunks = locate_states(s, start, Tk, CHUNK, QUERY_SPLITS, PACKED, IS_CAUSAL)
        c = tl.maximum(r, 0) if IS_CAUSAL else chunks
        before = splits_before(c, chunks, QUERY_SPLITS, REVERSED=True)
        for i in range(1 if QUERY_SPLITS == 1 else before + 1):
            n = (base + nth_state(i, before, c, chunks, QUERY_SPLITS, REVERSED=True)).to(tl.int64) * Hkv + h
            if NEEDS_DV:
                dv = accumulate_dv_inter(
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
                    D=D,
                    M=M,
                    D_MASK=D_MASK,
                    M_MASK=M_MASK,
                    SLICES=SLICES,
                    BLOCK_C=BLOCK_C,
                    MAP=MAP,
                    PRODUCT_DTYPE=PRODUCT_DTYPE,
                    PRECISION=PRECISION,
                )
            if NEEDS_DK:
                dk = accumulate_dk_inter(
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
                    D=D,
                    M=M,
                    M_MASK=M_MASK,
                    BLOCK_C=BLOCK_C,
                    PRODUCT_DTYPE=PRODUCT_DTYPE,
                    PRECISION=PRECISION,
                )
        if NEEDS_DV:
            dv = tl.where(mask_n[:, None], dv, 0.0)
            dv_ptr += b.to(tl.int64) * stride_dvb + h.to(tl.int64) * stride_dvh
            store_slice(dv_ptr, first_key, stride_dvt, exists_n, offs_t, offs_c, M_MASK, dv)
        if NEEDS_DK:
            if MAP != "identity":
                k = load_slice(k_ptr, first_key, stride_kt, mask_n, offs_t, offs_c, D_MASK)
                dk *= slope(k.to(tl.float32), MAP)
            dk = tl.where(mask_n[:, None], dk, 0.0)
            dk_ptr += b.to(tl.int64) * stride_dkb + h.to(tl.int64) * stride_dkh
            store_slice(dk_ptr, first_key, stride_dkt, exists_n, offs_t, offs_c, D_MASK, dk)
