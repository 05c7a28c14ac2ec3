"""Tiles of query-key pairs, the part that every kernel shares which computes scores.

A kernel holds one tile in registers and walks over tiles of the other side: `attend` sums p v over keys,
`pull_queries` sums dq over keys, `pull_keys` sums dk and dv over queries. p is the weight of a pair, a function of
t = q.k with constants a, b, c (similarity.py).

    MASKED    whether some pairs of the tiles walked over are hidden: by CAUSAL, by KEY_MASK, or because keys end.
              Tiles that need no masks are walked in a loop of their own.
    last      the last key that a query sees, an index into the keys at k_ptr: its own position + q_offset.
    EVEN_D    whether D fills BLOCK_D, EVEN_M whether M fills BLOCK_M; columns beyond are read as 0.

Pointers are those of one head; a tile's offset into them is a 64-bit scalar, the offsets inside it are 32-bit.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, rounded


@triton.jit
def load_rows(ptr, start, stride, keep, offs_t, offs_d, SIZE, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Rows start + offs_t of a matrix, 0 where not `keep` or beyond column SIZE: what is there may be NaN."""
    tile = ptr + tl.cast(start, tl.int64) * stride + (offs_t[:, None] * stride + offs_d[None, :])
    if MASKED and EVEN:
        return tl.load(tile, mask=keep[:, None], other=0.0)
    if MASKED:
        return tl.load(tile, mask=keep[:, None] & (offs_d < SIZE)[None, :], other=0.0)
    if EVEN:
        return tl.load(tile)
    return tl.load(tile, mask=(offs_d < SIZE)[None, :], other=0.0)


@triton.jit
def kept_keys(mask_ptr, keys, end, KEY_MASK: tl.constexpr):
    """Which keys there are and count."""
    keep = keys < end
    if KEY_MASK:
        keep = keep & (tl.load(mask_ptr + keys, mask=keep, other=0) != 0)
    return keep


@triton.jit
def weigh(t, a, b, c, SIMILARITY: tl.constexpr):
    """Weights of a tile of products t, for the similarities that are polynomials."""
    if SIMILARITY == "square":
        x = t * a + b
        return x * x + c
    if SIMILARITY == "polynomial":
        return (t * a + b) * t + c
    return t * a


@triton.jit
def pull_weights(t, dp, a, b, SIMILARITY: tl.constexpr):
    """The gradient to t of the gradient dp to the weights, up to the factor `Similarity.slope`."""
    if SIMILARITY == "square":
        return (t * a + b) * dp
    if SIMILARITY == "polynomial":
        return (t * (2 * a) + b) * dp
    return dp


@triton.jit
def no_sums(BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, SIMILARITY: tl.constexpr):
    """acc, l and m of rows that have seen nothing. The sums are held divided by what m stands for (`settled`); sums
    that do not start at nothing start with m = 1.
    """
    acc = tl.zeros([BLOCK_Q, BLOCK_M], tl.float32)
    l = tl.zeros([BLOCK_Q], tl.float32)
    if SIMILARITY == "softmax":
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    else:
        m = tl.full([BLOCK_Q], 2.0**-100, tl.float32)
    return acc, l, m


@triton.jit
def settled(acc, l, m, SIMILARITY: tl.constexpr, LOW: tl.constexpr):
    """The sums themselves: l is sum p. Those of softmax stay divided by 2^m."""
    if SIMILARITY != "softmax" and tl.float16 == LOW:
        return acc * m[:, None], l * m
    return acc, l


@triton.jit
def add_weights(t, seen, acc, l, m, a, b, c, SIMILARITY: tl.constexpr, MASKED: tl.constexpr, LOW: tl.constexpr):
    """Turn products into weights. Returns these, rounded, and acc, l, m on their scale.

    softmax: relative to 2^m, the largest of the row so far. In fp16, where a square would overflow at 256: relative to
    a power of two m within a factor of 2 of the largest. Otherwise as they are.
    """
    if SIMILARITY == "softmax":
        if MASKED:
            s = tl.where(seen, t * a, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet: 2^(-inf - 0) = 0
        else:
            s = t * a
            m_new = tl.maximum(m, tl.max(t, 1) * a)  # a >= 0: queries carry the sign of the scale
            shift = m_new
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(m - shift)
        return rounded(p, LOW), acc * decay[:, None], l * decay + tl.sum(p, 1), m_new

    p = weigh(t, a, b, c, SIMILARITY)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    if tl.float16 == LOW:
        top = tl.max(tl.abs(p), 1).to(tl.int32, bitcast=True) & 0x7F800000
        m_new = tl.maximum(m, top.to(tl.float32, bitcast=True))
        p = p * (1.0 / m_new)[:, None]
        decay = m / m_new
        acc, l, m = acc * decay[:, None], l * decay, m_new
    weights = rounded(p, LOW)
    if MASKED:
        # (1 + s)^2 may vanish, and rows with a small sum have seen few keys: here. Summing what is multiplied with v
        # makes an error common to both cancel.
        l += tl.sum(weights.to(tl.float32), 1)
    else:
        l += tl.sum(p, 1)
    return weights, acc, l, m


@triton.jit
def attend(
    acc, l, m, q, k_ptr, v_ptr, mask_ptr, start, stop, end, last, stride_kt, stride_vt, D, M, a, b, c,
    SIMILARITY: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, MASKED: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add keys start..stop, of which those from `end` on do not exist, to the sums of queries q [BLOCK_Q, BLOCK_D]."""
    offs_k, offs_d, offs_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    for j0 in tl.range(start, stop, BLOCK_K):
        keys = j0 + offs_k
        keep = keys
        if MASKED:
            keep = kept_keys(mask_ptr, keys, end, KEY_MASK)
        k = load_rows(k_ptr, j0, stride_kt, keep, offs_k, offs_d, D, MASKED, EVEN_D)
        t = dot(q, tl.trans(k), None, PRECISION)
        seen = keep[None, :]
        if MASKED and CAUSAL:
            seen = seen & (keys[None, :] <= last[:, None])
        p, acc, l, m = add_weights(t, seen, acc, l, m, a, b, c, SIMILARITY, MASKED, LOW)
        v = load_rows(v_ptr, j0, stride_vt, keep, offs_k, offs_m, M, MASKED, EVEN_M)
        acc = dot(p, v, acc, PRECISION)
    return acc, l, m


# Backward. `delta` of a query is sum(dout * out), or 0 if nothing is divided; `norm` is 1/l, for softmax the
# log-sum-exp in base 2. p below is the weight divided by the row's sum, so that gradients need no range beyond that of
# the inputs, and g the gradient to the weight before the division: (dout v^T - delta) / l, for softmax without that l.


@triton.jit
def pull_pairs(t, g, norm, seen, a, b, c, SIMILARITY: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr):
    """P of a tile, and ds, the gradient to t up to the slope; norm and seen are broadcastable to t."""
    if SIMILARITY == "softmax":
        s = t * a - norm
        if MASKED:
            s = tl.where(seen, s, float("-inf"))  # hidden scores may be beyond the sum's range
        p = tl.exp2(s)
        ds = p * g
    else:
        p = weigh(t, a, b, c, SIMILARITY)
        if NORMALIZE:
            p *= norm
        ds = pull_weights(t, g, a, b, SIMILARITY)
        if MASKED:
            p = tl.where(seen, p, 0.0)
            ds = tl.where(seen, ds, 0.0)
    return p, ds


@triton.jit
def pull_queries(
    dq, q, dout, norm, delta, k_ptr, v_ptr, mask_ptr, start, stop, end, last, stride_kt, stride_vt, D, M, a, b, c,
    SIMILARITY: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add to dq, without the slope, what keys start..stop give back to queries q with gradients dout."""
    offs_k, offs_d, offs_m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    for j0 in tl.range(start, stop, BLOCK_K):
        keys = j0 + offs_k
        keep = keys
        if MASKED:
            keep = kept_keys(mask_ptr, keys, end, KEY_MASK)
        k = load_rows(k_ptr, j0, stride_kt, keep, offs_k, offs_d, D, MASKED, EVEN_D)
        v = load_rows(v_ptr, j0, stride_vt, keep, offs_k, offs_m, M, MASKED, EVEN_M)
        t = dot(q, tl.trans(k), None, PRECISION)
        g = dot(dout, tl.trans(v), None, PRECISION)
        if SIMILARITY == "softmax":
            g -= delta[:, None]
        elif NORMALIZE:
            g = g * norm[:, None] - (delta * norm)[:, None]
        seen = keep[None, :]
        if MASKED and CAUSAL:
            seen = seen & (keys[None, :] <= last[:, None])
        _, ds = pull_pairs(t, g, norm[:, None], seen, a, b, c, SIMILARITY, MASKED, NORMALIZE)
        dq = dot(rounded(ds, LOW), k, dq, PRECISION)
    return dq


@triton.jit
def pull_keys(
    dk, dv, k, v, keys, q_ptr, dout_ptr, norm_ptr, delta_ptr, start, stop, end, q_offset, stride_qt, stride_dot,
    D, M, a, b, c,
    SIMILARITY: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr, NORMALIZE: tl.constexpr,
    WANT_DK: tl.constexpr, WANT_DV: tl.constexpr, EVEN_D: tl.constexpr, EVEN_M: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add to dk, without the slope, and to dv what queries start..stop give back to keys k [BLOCK_K, BLOCK_D] and
    values v. Tiles of pairs are transposed: [BLOCK_K, BLOCK_Q].

    MASKED: some pairs are hidden by causality. RAGGED: queries from `end` on do not exist; q and dout are read as 0
    there, so that they give nothing. Rows of keys that do not count are left with anything: store zeros there.
    """
    offs_q, offs_d, offs_m = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    for i0 in tl.range(start, stop, BLOCK_Q):
        queries = i0 + offs_q
        real = queries < end
        q = load_rows(q_ptr, i0, stride_qt, real, offs_q, offs_d, D, RAGGED, EVEN_D)
        dout = load_rows(dout_ptr, i0, stride_dot, real, offs_q, offs_m, M, RAGGED, EVEN_M)
        norm, delta = queries, queries
        if NORMALIZE and RAGGED:
            norm = tl.load(norm_ptr + queries, mask=real, other=float("inf") if SIMILARITY == "softmax" else 0.0)
            delta = tl.load(delta_ptr + queries, mask=real, other=0.0)
        elif NORMALIZE:
            norm = tl.load(norm_ptr + queries)
            delta = tl.load(delta_ptr + queries)
        t = dot(k, tl.trans(q), None, PRECISION)
        g = t
        if WANT_DK:
            g = tl.zeros([k.shape[0], BLOCK_Q], tl.float32)
            if NORMALIZE:
                g -= delta[None, :]  # before the product, so that delta needs no registers during it
            g = dot(v, tl.trans(dout), g, PRECISION)
            if NORMALIZE and SIMILARITY != "softmax":
                g *= norm[None, :]
        seen = keys[:, None] <= queries[None, :] + q_offset
        p, ds = pull_pairs(t, g, norm[None, :], seen, a, b, c, SIMILARITY, MASKED, NORMALIZE)
        if WANT_DV:
            dv = dot(rounded(p, LOW), dout, dv, PRECISION)
        if WANT_DK:
            dk = dot(rounded(ds, LOW), q, dk, PRECISION)
    return dk, dv
