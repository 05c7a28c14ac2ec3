"""A tile of keys: dk (GRAD) or dv (QUERY): the sums of later rows that read its boundary, and the rows that computed
its scores; of the rows that are lost to the sums (rows.py), a kernel of its own.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.mainloop import accumulate_dkv, load_key_mask, load_tile
from linattn.kernels.common.gpu.numerics import round_to
from linattn.kernels.quadratic.gpu.folded import pull_pairs, pull_record, read_pairs, read_record
from linattn.kernels.quadratic.gpu.places import existing, first_reader, head_of, place_of, rows_between, tile_of_rows

LOOK = tl.constexpr(1024)
"""Tiles of rows that are looked at together, for a lost row."""


@triton.jit
def pull_sums(
    dk, dv, k_tile, v_tile, sums_ptr, record_ptr, D, M, slope,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, FOLD: tl.constexpr,
    PRECISION: tl.constexpr, GRAM: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """dk, without the slope, or dv plus what the sums over later rows give. Sums and record carry all weights."""
    if OF_VALUES:
        dv = read_pairs(dv, k_tile, sums_ptr, D, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
        dv = read_record(dv, k_tile, record_ptr, D, 1.0, 1.0, BLOCK_D, BLOCK_M, EVEN, FOLD, PRECISION)
    else:
        dk = pull_pairs(dk, k_tile, v_tile, sums_ptr, D, M, BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION)
        one = tl.full([dk.shape[0]], 1.0, tl.float32)
        dk = pull_record(
            dk, k_tile, v_tile, one, record_ptr, D, M, 1.0, 1.0, BLOCK_D, BLOCK_M, EVEN, True, FOLD, PRECISION, GRAM
        )
        dk /= slope
    return dk, dv


@triton.jit
def tile_of_keys(
    cu_seqlens_ptr, S, T, Tk, CHUNK, tiles, slots, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """This program's tile of keys: the batch element, the first row of the sequence there, its numbers of rows and of
    keys, the tile's first key, the first boundary after it, the last one, and the slot of the former.
    """
    batch, start, Tk, _, key_0, last, slot = tile_of_rows(
        tl.program_id(0), cu_seqlens_ptr, S, Tk, Tk, 0, CHUNK, tiles, slots, BLOCK_K, CAUSAL, PACKED
    )
    boundary = key_0 // CHUNK + 1
    return batch, start, Tk if PACKED else T, Tk, key_0, boundary, last, slot + boundary


@triton.jit
def load_keys(
    k_ptr, v_ptr, key_mask_ptr, first, key_0, Tk, stride_kt, stride_vt, D, M,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, KEY_MASK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The keys of a tile, which of them count, k and v of these, and zeros for dk and dv. `first`: where the mask of
    the sequence begins.
    """
    offs_k, offs_d, offs_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    keys = key_0 + offs_k
    if KEY_MASK:
        key_mask_ptr += first
    keep = load_key_mask(key_mask_ptr, keys, Tk, KEY_MASK)
    k = load_tile(k_ptr, 0, stride_kt, keep, offs_k, offs_d, D, True, EVEN)
    v = load_tile(v_ptr, 0, stride_vt, keep, offs_k, offs_m, M, True, EVEN)
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    return keys, keep, k, v, dk, dv


@triton.jit
def pull_folded_keys(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, dout_ptr, norm_ptr, delta_ptr, gradient_ptr,
    sums_ptr, record_ptr, cu_seqlens_ptr, rows_from_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    S, T, Tk, H, D, M, q_offset, CHUNK, tiles, slots, size,
    a, b, c, slope,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr, SIMILARITY: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr, EVEN: tl.constexpr, LOW: tl.constexpr,
    FOLD: tl.constexpr, PRECISION: tl.constexpr, GRAM: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """`gradient` is dv if OF_VALUES, else dk."""
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, key_0, boundary, last, slot = tile_of_keys(
        cu_seqlens_ptr, S, T, Tk, CHUNK, tiles, slots, BLOCK_K, CAUSAL, PACKED
    )
    if key_0 >= Tk:
        return
    k_ptr = head_of(k_ptr, batch, h, start + key_0, stride_kb, stride_kh, stride_kt)
    v_ptr = head_of(v_ptr, batch, h, start + key_0, stride_vb, stride_vh, stride_vt)
    q_ptr = head_of(q_ptr, batch, h * GROUP, start, stride_qb, stride_qh, stride_qt)
    dout_ptr = head_of(dout_ptr, batch, h * GROUP, start, stride_gb, stride_gh, stride_gt)
    gradient_ptr = head_of(gradient_ptr, batch, h, start + key_0, stride_db, stride_dh, stride_dt)
    row = (batch * H + h) * GROUP * T_all + start
    pairs, record = place_of(slot, h, H, BLOCK_D, BLOCK_M, size)
    keys, keep, k, v, dk, dv = load_keys(
        k_ptr, v_ptr, key_mask_ptr, batch * stride_mb + start, key_0, Tk, stride_kt, stride_vt, D, M,
        BLOCK_K, BLOCK_D, BLOCK_M, KEY_MASK, EVEN,
    )  # fmt: skip
    # The sums come first: after loops over pairs, Triton 3.6 has every product of this loop wait for the one before.
    offs = existing(tl.arange(0, BLOCK_K), key_0, Tk)[:, None]
    dk, dv = pull_sums(
        dk, dv, k_ptr + offs * stride_kt, v_ptr + offs * stride_vt, sums_ptr + pairs, record_ptr + record, D, M, slope,
        BLOCK_D, BLOCK_M, WIDTH, EVEN, FOLD, PRECISION, GRAM, OF_VALUES,
    )  # fmt: skip
    end = first_reader(boundary, last, slot, rows_from_ptr, CHUNK, CAUSAL, TABLE)
    begin, stop = rows_between(key_0 if CAUSAL else 0, end, q_offset, T, CAUSAL)
    # Tiles of queries on the diagonal, then those that see all of these keys. If the compiler took it that a loop may
    # take no step, every matrix product would wait (ptxas: wgmma serialized): each takes one, if on rows that do not
    # count.
    full = begin
    if CAUSAL:
        diagonal = tl.maximum(key_0 + BLOCK_K - 1 - q_offset - begin, 0)
        full = tl.minimum(begin + tl.cdiv(diagonal, BLOCK_Q) * BLOCK_Q, stop)
    to_full, to_stop = tl.maximum(full, begin + 1), tl.maximum(stop, full + 1)
    tl.assume(to_full > begin)
    tl.assume(to_stop > full)
    for _ in tl.static_range(GROUP):
        if CAUSAL:
            dk, dv = accumulate_dkv(
                dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr + row, delta_ptr + row, begin,
                to_full, full, q_offset, stride_qt, stride_gt, D, M, a, b, c,
                SIMILARITY, True, True, NORMALIZE, not OF_VALUES, OF_VALUES, EVEN, EVEN, LOW, PRECISION,
                BLOCK_Q, BLOCK_D, BLOCK_M,
            )  # fmt: skip
        dk, dv = accumulate_dkv(
            dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr + row, delta_ptr + row, full,
            to_stop, stop, q_offset, stride_qt, stride_gt, D, M, a, b, c,
            SIMILARITY, False, True, NORMALIZE, not OF_VALUES, OF_VALUES, EVEN, EVEN, LOW, PRECISION,
            BLOCK_Q, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        q_ptr += stride_qh
        dout_ptr += stride_gh
        row += T_all
    if OF_VALUES:
        store_gradient(gradient_ptr, dv, keep, keys < Tk, stride_dt, M, LOW)
    else:
        store_gradient(gradient_ptr, dk * slope, keep, keys < Tk, stride_dt, D, LOW)


@triton.jit
def store_gradient(ptr, x, keep, real, stride, SIZE, LOW: tl.constexpr):
    """Rows of a tile, 0 for keys that do not count."""
    offs_t, offs = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    x = round_to(tl.where(keep[:, None], x, 0.0), LOW)
    tl.store(ptr + offs_t * stride + offs, x, mask=real[:, None] & (offs < SIZE))


@triton.jit
def add_gradient(ptr, x, keep, stride, SIZE, LOW: tl.constexpr):
    """To rows that are there already."""
    offs_t, offs = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    mask = keep[:, None] & (offs < SIZE)
    before = tl.load(ptr + offs_t * stride + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptr + offs_t * stride + offs, round_to(before + x, LOW), mask=mask)


@triton.jit
def next_lost(lost_tiles_ptr, tile, tiles):
    """The first tile from `tile` on with a lost row; `tiles` if there is none."""
    found = tiles
    while (tile < tiles) & (found == tiles):
        numbers = tile + tl.arange(0, LOOK)
        lost = tl.load(lost_tiles_ptr + numbers, mask=numbers < tiles, other=0)
        found = tl.min(tl.where(lost != 0, numbers, tiles), 0)
        tile += LOOK
    return found


@triton.jit
def pull_lost_rows(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, dout_ptr, lost_norm_ptr, delta_ptr, lost_tiles_ptr, dk_ptr, dv_ptr,
    cu_seqlens_ptr, rows_from_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb,
    stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    S, T, Tk, H, D, M, q_offset, CHUNK, tiles, lost_tiles, slots, a, b, c, slope,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    SIMILARITY: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, PACKED: tl.constexpr, TABLE: tl.constexpr,
    EVEN: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what lost rows of later boundaries give back: their norm is not 0 in `lost_norm`, and their
    tiles of BLOCK_Q rows are marked. Where there are none, this ends at once.
    """
    h, T_all = tl.cast(tl.program_id(1), tl.int64), T
    batch, start, T, Tk, key_0, boundary, last, slot = tile_of_keys(
        cu_seqlens_ptr, S, T, Tk, CHUNK, tiles, slots, BLOCK_K, CAUSAL, PACKED
    )
    if key_0 >= Tk:
        return
    k_ptr = head_of(k_ptr, batch, h, start + key_0, stride_kb, stride_kh, stride_kt)
    v_ptr = head_of(v_ptr, batch, h, start + key_0, stride_vb, stride_vh, stride_vt)
    keys, keep, k, v, dk, dv = load_keys(
        k_ptr, v_ptr, key_mask_ptr, batch * stride_mb + start, key_0, Tk, stride_kt, stride_vt, D, M,
        BLOCK_K, BLOCK_D, BLOCK_M, KEY_MASK, EVEN,
    )  # fmt: skip
    end = first_reader(boundary, last, slot, rows_from_ptr, CHUNK, CAUSAL, TABLE)
    _, stop = rows_between(key_0 if CAUSAL else 0, end, q_offset, T, CAUSAL)
    first, end = ((start + stop) // BLOCK_Q).to(tl.int32), tl.cdiv(start + T, BLOCK_Q).to(tl.int32)
    found = False
    for member in range(GROUP):
        head = batch * H * GROUP + h * GROUP + member
        row = head * T_all + start
        q_head = head_of(q_ptr, batch, h * GROUP + member, start, stride_qb, stride_qh, stride_qt)
        dout_head = head_of(dout_ptr, batch, h * GROUP + member, start, stride_gb, stride_gh, stride_gt)
        tile = next_lost(lost_tiles_ptr + head * lost_tiles, first, end)
        while tile < end:
            row_0 = tl.maximum((tile * BLOCK_Q - start).to(tl.int32), stop)
            dk, dv = accumulate_dkv(
                dk, dv, k, v, keys, q_head, dout_head, lost_norm_ptr + row, delta_ptr + row, row_0, row_0 + BLOCK_Q,
                tl.minimum(((tile + 1) * BLOCK_Q - start).to(tl.int32), T), q_offset, stride_qt, stride_gt, D, M,
                a, b, c, SIMILARITY, False, True, True, WANT_DK, WANT_DV, EVEN, EVEN, LOW, PRECISION,
                BLOCK_Q, BLOCK_D, BLOCK_M,
            )  # fmt: skip
            found = True
            tile = next_lost(lost_tiles_ptr + head * lost_tiles, tile + 1, end)
    if found:
        if WANT_DK:
            dk_ptr = head_of(dk_ptr, batch, h, start + key_0, stride_dkb, stride_dkh, stride_dkt)
            add_gradient(dk_ptr, dk * slope, keep, stride_dkt, D, LOW)
        if WANT_DV:
            dv_ptr = head_of(dv_ptr, batch, h, start + key_0, stride_dvb, stride_dvh, stride_dvt)
            add_gradient(dv_ptr, dv, keep, stride_dvt, M, LOW)
