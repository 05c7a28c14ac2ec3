"""Backward: dq, dk and dv of one chunk, from the sums before it, the gradients to the sums after it and the scores
inside it.

    dx = O S^T - delta z + dA phi(K)       dphi(K) = V dS^T + dz + dA^T x       dV = phi(K) dS + P^T O

Tiles of scores are computed transposed, P^T and dA^T `[keys, rows]`, so that the products for the keys take them from
registers. One program makes BLOCK columns of all three; what is contracted is read in slices of BLOCK too.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to
from linattn.kernels.feature_map.gpu.layout import source, splits_before, stored_sums, tile_at
from linattn.kernels.feature_map.gpu.maps import key_features, load_rows, operand, query_features, slope, store_rows
from linattn.kernels.feature_map.gpu.sums import load_row_gradient


@triton.jit(do_not_specialize=["Tq", "Tk", "q_offset"])
def chunk_gradients(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, l_ptr, key_mask_ptr, cu_seqlens_ptr,
    totals_ptr, sums_ptr, dtotals_ptr, dsums_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, stride_dob, stride_doh, stride_dot,
    stride_dqb, stride_dqh, stride_dqt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    stride_mb,
    places, sequences, Hkv, Tq, Tk, q_offset, W, scale,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    KEY_SPLITS: tl.constexpr, ROW_SPLITS: tl.constexpr, DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    D_SLICES: tl.constexpr = (D + BLOCK - 1) // BLOCK
    M_SLICES: tl.constexpr = (M + BLOCK - 1) // BLOCK
    SLICES: tl.constexpr = max(D_SLICES, M_SLICES)
    UNEVEN: tl.constexpr = D % BLOCK > 0 or M % BLOCK > 0 or D_SLICES != M_SLICES
    D_MASK: tl.constexpr = D if UNEVEN else 0
    M_MASK: tl.constexpr = M if UNEVEN else 0
    pid = tl.program_id(0)
    offs_c = pid % SLICES * BLOCK + tl.arange(0, BLOCK)  # the columns this program makes
    place = pid // SLICES % places
    h = pid // SLICES // places % Hkv
    b = pid // SLICES // places // Hkv
    offs = tl.arange(0, BLOCK)
    offs_t = tl.arange(0, CHUNK)
    row_stride = Tq  # of l
    s, r, start, Tq, Tk, offset = tile_at(
        place, b, cu_seqlens_ptr, sequences, Tq, Tk, q_offset, W, True, CHUNK, PACKED, IS_CAUSAL
    )
    first_row, first_key = r * CHUNK - offset, r * CHUNK
    if (first_row >= Tq) & (first_key >= Tk):
        return
    rows = (first_row + offs_t >= 0) & (first_row + offs_t < Tq)
    keys = (first_key + offs_t >= 0) & (first_key + offs_t < Tk)
    seen = keys
    if MASKED:
        key_mask_ptr += b.to(tl.int64) * stride_mb + start + first_key
        seen &= tl.load(key_mask_ptr + offs_t, mask=keys, other=0) != 0
    first_row += start
    first_key += start
    visible = (offs_t[:, None] <= offs_t[None, :]) & seen[:, None] & rows[None, :]
    k_ptr += b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh
    k = load_rows(k_ptr, first_key, stride_kt, offs_t, offs_c, seen, D_MASK)
    fk = key_features(k, seen, offs_c, D_MASK, MAP, LOW)
    v = operand(load_rows(v_ptr, first_key, stride_vt, offs_t, offs, seen, M_MASK), LOW)
    dk = tl.zeros([CHUNK, BLOCK], tl.float32)
    dv = tl.zeros([CHUNK, BLOCK], tl.float32)

    for g in range(G):
        head = h * G + g
        q = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        o = out_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        do = dout_ptr + b.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
        l = l_ptr + (b * Hkv * G + head).to(tl.int64) * row_stride
        x = load_rows(q, first_row, stride_qt, offs_t, offs_c, rows, D_MASK)
        x = query_features(x, scale, offs_c, D_MASK, MAP, LOW)
        dA = tl.zeros([CHUNK, CHUNK], tl.float32)
        O, delta = load_row_gradient(
            do, o, l, first_row, stride_dot, stride_ot, offs_t, offs, rows, M_MASK, NORMALIZE, LOW
        )
        if IS_CAUSAL and (DQ or DK):
            dA = dot(v, tl.trans(O), dA, PRECISION)
        for m in range(1, M_SLICES):
            v_m = operand(load_rows(v_ptr, first_key, stride_vt, offs_t, m * BLOCK + offs, seen, M_MASK), LOW)
            O_m, part = load_row_gradient(
                do, o, l, first_row, stride_dot, stride_ot, offs_t, m * BLOCK + offs, rows, M_MASK, NORMALIZE, LOW
            )
            delta += part
            if IS_CAUSAL and (DQ or DK):
                dA = dot(v_m, tl.trans(O_m), dA, PRECISION)
        if IS_CAUSAL and (DQ or DK):
            dA = round_to(tl.where(visible, dA - delta[None, :], 0.0), LOW)

        if DQ:
            dx = tl.zeros([CHUNK, BLOCK], tl.float32)
            base, chunks = stored_sums(s, start, Tk, CHUNK, KEY_SPLITS, PACKED, IS_CAUSAL)
            c = tl.maximum(r, 0) if IS_CAUSAL else chunks
            before = splits_before(c, chunks, KEY_SPLITS, False)
            for n in range(1 if KEY_SPLITS == 1 else before + 1):
                at = (base + source(n, before, c, chunks, KEY_SPLITS, False)).to(tl.int64) * Hkv + h
                S = load_rows(sums_ptr, at * D, M, offs_c, offs, offs_c < D, M_MASK)
                dx = dot(O, tl.trans(S), dx, PRECISION)
                for m in range(1, M_SLICES):
                    offs_m = m * BLOCK + offs
                    O_m, part = load_row_gradient(
                        do, o, l, first_row, stride_dot, stride_ot, offs_t, offs_m, rows, M_MASK, NORMALIZE, LOW
                    )
                    S = load_rows(sums_ptr, at * D, M, offs_c, offs_m, offs_c < D, M_MASK)
                    dx = dot(O_m, tl.trans(S), dx, PRECISION)
                if NORMALIZE:
                    z = tl.load(totals_ptr + at * D + offs_c, mask=offs_c < D, other=0.0)
                    dx -= delta[:, None] * z[None, :]
            if IS_CAUSAL:
                dx = dot(tl.trans(dA), fk, dx, PRECISION)
            dx *= scale
            if MAP != "identity":
                x_c = load_rows(q, first_row, stride_qt, offs_t, offs_c, rows, D_MASK)  # again: registers are scarce
                dx *= slope(x_c.to(tl.float32), MAP)
            dq_g = dq_ptr + b.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
            store_rows(dq_g, first_row, stride_dqt, offs_t, offs_c, rows, D_MASK, dx)

        if DK and IS_CAUSAL:
            dk = dot(dA, x, dk, PRECISION)
        if DV and IS_CAUSAL:
            p = tl.zeros([CHUNK, CHUNK], tl.float32)
            if SLICES == 1:
                p = dot(fk, tl.trans(x), p, PRECISION)
            else:
                for d in range(D_SLICES):
                    offs_d = d * BLOCK + offs
                    x_d = load_rows(q, first_row, stride_qt, offs_t, offs_d, rows, D_MASK)
                    x_d = query_features(x_d, scale, offs_d, D_MASK, MAP, LOW)
                    f_d = load_rows(k_ptr, first_key, stride_kt, offs_t, offs_d, seen, D_MASK)
                    f_d = key_features(f_d, seen, offs_d, D_MASK, MAP, LOW)
                    p = dot(f_d, tl.trans(x_d), p, PRECISION)
                O, part = load_row_gradient(
                    do, o, l, first_row, stride_dot, stride_ot, offs_t, offs_c, rows, M_MASK, NORMALIZE, LOW
                )
            dv = dot(round_to(tl.where(visible, p, 0.0), LOW), O, dv, PRECISION)

    if DK or DV:  # what rows of later chunks made of these keys
        base, chunks = stored_sums(s, start, Tk, CHUNK, ROW_SPLITS, PACKED, IS_CAUSAL)
        c = tl.maximum(r, 0) if IS_CAUSAL else chunks
        before = splits_before(c, chunks, ROW_SPLITS, True)
        for n in range(1 if ROW_SPLITS == 1 else before + 1):
            at = (base + source(n, before, c, chunks, ROW_SPLITS, True)).to(tl.int64) * Hkv + h
            if DV:
                if SLICES == 1:
                    dS = load_rows(dsums_ptr, at * D, M, offs, offs_c, offs < D, M_MASK)
                    dv = dot(fk, dS, dv, PRECISION)
                else:
                    for d in range(D_SLICES):
                        offs_d = d * BLOCK + offs
                        f_d = load_rows(k_ptr, first_key, stride_kt, offs_t, offs_d, seen, D_MASK)
                        f_d = key_features(f_d, seen, offs_d, D_MASK, MAP, LOW)
                        dS = load_rows(dsums_ptr, at * D, M, offs_d, offs_c, offs_d < D, M_MASK)
                        dv = dot(f_d, dS, dv, PRECISION)
            if DK:
                dS = load_rows(dsums_ptr, at * D, M, offs_c, offs, offs_c < D, M_MASK)
                dk = dot(v, tl.trans(dS), dk, PRECISION)
                for m in range(1, M_SLICES):
                    offs_m = m * BLOCK + offs
                    v_m = operand(load_rows(v_ptr, first_key, stride_vt, offs_t, offs_m, seen, M_MASK), LOW)
                    dS = load_rows(dsums_ptr, at * D, M, offs_c, offs_m, offs_c < D, M_MASK)
                    dk = dot(v_m, tl.trans(dS), dk, PRECISION)
                dk += tl.load(dtotals_ptr + at * D + offs_c, mask=offs_c < D, other=0.0)[None, :]
        if DV:
            dv = tl.where(seen[:, None], dv, 0.0)
            dv_ptr += b.to(tl.int64) * stride_dvb + h.to(tl.int64) * stride_dvh
            store_rows(dv_ptr, first_key, stride_dvt, offs_t, offs_c, keys, M_MASK, dv)
        if DK:
            if MAP != "identity":
                k = load_rows(k_ptr, first_key, stride_kt, offs_t, offs_c, seen, D_MASK)
                dk *= slope(k.to(tl.float32), MAP)
            dk = tl.where(seen[:, None], dk, 0.0)
            dk_ptr += b.to(tl.int64) * stride_dkb + h.to(tl.int64) * stride_dkh
            store_rows(dk_ptr, first_key, stride_dkt, offs_t, offs_c, keys, D_MASK, dk)
