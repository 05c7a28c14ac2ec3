"""Inner loops over tiles of scores, which every kernel shares that computes scores.

A kernel holds one tile in registers and loops over tiles of the other side: `accumulate_output` sums p v over keys,
`accumulate_dq` sums dq over keys, `accumulate_dkv` sums dk and dv over queries. p is the weight of a query and a key, a
function of t = q.k with constants a, b, c (similarity.py).

    MASKED     whether some scores of the tiles are hidden: by CAUSAL, by KEY_MASK, or because keys end. Tiles that
               need no mask have a loop of their own.
    last_key   the last key that a query sees, an index into the keys at k_ptr: its own position + q_offset.
    EVEN_D     whether D fills BLOCK_D, EVEN_DV whether M fills BLOCK_DV; columns beyond are loaded as 0.

Pointers are those of one head; a tile's offset into them is a 64-bit scalar, the offsets inside it are 32-bit.
"""

import triton
import triton.language as tl

from linattn.kernels.common.gpu.numerics import dot, round_to


@triton.jit
def load_tile(ptr, start, stride, mask, offs_t, offs_d, SIZE, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Load rows start + offs_t of a matrix, 0 where not `mask` or beyond column SIZE: memory there may hold NaN."""
    tile = ptr + tl.cast(start, tl.int64) * stride + (offs_t[:, None] * stride + offs_d[None, :])
    if MASKED and EVEN:
        return tl.load(tile, mask=mask[:, None], other=0.0)
    elif MASKED:
        return tl.load(tile, mask=mask[:, None] & (offs_d < SIZE)[None, :], other=0.0)
    elif EVEN:
        return tl.load(tile)
    else:
        return tl.load(tile, mask=(offs_d < SIZE)[None, :], other=0.0)


@triton.jit
def load_key_mask(key_mask_ptr, keys, end, KEY_MASK: tl.constexpr):
    """Load which keys count: those before `end` that the mask keeps."""
    mask_n = keys < end
    if KEY_MASK:
        mask_n = mask_n & (tl.load(key_mask_ptr + keys, mask=mask_n, other=0) != 0)
    return mask_n


@triton.jit
def weigh(t, a, b, c, SIMILARITY: tl.constexpr):
    """Compute the weights of a tile of products t, for the similarities that are polynomials."""
    if SIMILARITY == "square":
        x = t * a + b
        return x * x + c
    elif SIMILARITY == "polynomial":
        return (t * a + b) * t + c
    else:
        return t * a


@triton.jit
def weigh_backward(t, dp, a, b, SIMILARITY: tl.constexpr):
    """Compute the gradient to t of the gradient dp to the weights, up to the factor `Similarity.slope`."""
    if SIMILARITY == "square":
        return (t * a + b) * dp
    elif SIMILARITY == "polynomial":
        return (t * (2 * a) + b) * dp
    else:
        return dp


@triton.jit
def init_accumulators(BLOCK_T: tl.constexpr, BLOCK_DV: tl.constexpr, SIMILARITY: tl.constexpr):
    """Return acc, l and m of queries that have seen no key. The sums are held divided by what m stands for (`unscale`);
    sums that do not start at 0 start with m = 1.
    """
    acc = tl.zeros([BLOCK_T, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    if SIMILARITY == "softmax":
        m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    else:
        m = tl.full([BLOCK_T], 2.0**-100, tl.float32)
    return acc, l, m


@triton.jit
def unscale(acc, l, m, SIMILARITY: tl.constexpr, IN_DTYPE: tl.constexpr):
    """Return the sums themselves: l is sum p. Those of softmax stay divided by 2^m."""
    if SIMILARITY != "softmax" and tl.float16 == IN_DTYPE:
        return acc * m[:, None], l * m
    else:
        return acc, l


@triton.jit
def accumulate_weights(
    t,
    visible,
    acc,
    l,
    m,
    a,
    b,
    c,
    SIMILARITY: tl.constexpr,
    MASKED: tl.constexpr,
    IN_DTYPE: tl.constexpr,
):
    """Turn products t into weights p and add them to l. Return p, rounded, and acc, l, m on their scale.

    softmax: relative to 2^m, m the largest score of the query so far. In fp16, where a square would overflow at 256:
    relative to a power of two m within a factor of 2 of the largest. Otherwise as they are.
    """
    if SIMILARITY == "softmax":
        if MASKED:
            s = tl.where(visible, t * a, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query without a key yet: 2^(-inf - 0) = 0
        else:
            s = t * a
            m_new = tl.maximum(m, tl.max(t, 1) * a)  # a >= 0: queries carry the sign of the scale
            shift = m_new
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(m - shift)
        return round_to(p, IN_DTYPE), acc * decay[:, None], l * decay + tl.sum(p, 1), m_new
    else:
        p = weigh(t, a, b, c, SIMILARITY)
        if MASKED:
            p = tl.where(visible, p, 0.0)
        if tl.float16 == IN_DTYPE:
            top = tl.max(tl.abs(p), 1).to(tl.int32, bitcast=True) & 0x7F800000
            m_new = tl.maximum(m, top.to(tl.float32, bitcast=True))
            p = p * (1.0 / m_new)[:, None]
            decay = m / m_new
            acc, l, m = acc * decay[:, None], l * decay, m_new
        weights = round_to(p, IN_DTYPE)
        if MASKED:
            # (1 + s)^2 may vanish, and queries with a small sum have seen few keys: here. Summing what is multiplied
            # with v makes an error common to both cancel.
            l += tl.sum(weights.to(tl.float32), 1)
        else:
            l += tl.sum(p, 1)
        return weights, acc, l, m


@triton.jit
def accumulate_output(
    acc,
    l,
    m,
    q,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    start,
    stop,
    end,
    last_key,
    stride_kt,
    stride_vt,
    D,
    M,
    a,
    b,
    c,
    SIMILARITY: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute acc += p v and l += sum p over keys start..stop, for queries q [BLOCK_T, BLOCK_D]. Keys from `end` on do
    not exist.
    """
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for n0 in tl.range(start, stop, BLOCK_N):
        keys = n0 + offs_n
        mask_n = keys
        if MASKED:
            mask_n = load_key_mask(key_mask_ptr, keys, end, KEY_MASK)
        k = load_tile(k_ptr, n0, stride_kt, mask_n, offs_n, offs_d, D, MASKED, EVEN_D)
        # [BLOCK_T, D] @ [D, BLOCK_N] -> [BLOCK_T, BLOCK_N]
        t = dot(q, tl.trans(k), None, PRECISION)
        visible = mask_n[None, :]
        if MASKED and CAUSAL:
            visible = visible & (keys[None, :] <= last_key[:, None])
        p, acc, l, m = accumulate_weights(t, visible, acc, l, m, a, b, c, SIMILARITY, MASKED, IN_DTYPE)
        v = load_tile(v_ptr, n0, stride_vt, mask_n, offs_n, offs_dv, M, MASKED, EVEN_DV)
        # [BLOCK_T, BLOCK_N] @ [BLOCK_N, DV] -> [BLOCK_T, DV]
        acc = dot(p, v, acc, PRECISION)
    return acc, l, m


# Backward. `delta` of a query is sum(dout * out), or 0 if nothing is divided; `norm` is 1/l, for softmax the
# log-sum-exp in base 2. p below is the weight divided by the query's sum, so that gradients need no range beyond that
# of the inputs, and g the gradient to the weight before the division: (dout v^T - delta) / l, for softmax without that
# l.


@triton.jit
def recompute_p_and_ds(
    t,
    g,
    norm,
    visible,
    a,
    b,
    c,
    SIMILARITY: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Recompute p of a tile and ds, the gradient to t up to the slope; norm and visible are broadcastable to t."""
    if SIMILARITY == "softmax":
        s = t * a - norm
        if MASKED:
            s = tl.where(visible, s, float("-inf"))  # hidden scores may be beyond the sum's range
        p = tl.exp2(s)
        ds = p * g
    else:
        p = weigh(t, a, b, c, SIMILARITY)
        if NORMALIZE:
            p *= norm
        ds = weigh_backward(t, g, a, b, SIMILARITY)
        if MASKED:
            p = tl.where(visible, p, 0.0)
            ds = tl.where(visible, ds, 0.0)
    return p, ds


@triton.jit
def accumulate_dq(
    dq,
    q,
    dout,
    norm,
    delta,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    start,
    stop,
    end,
    last_key,
    stride_kt,
    stride_vt,
    D,
    M,
    a,
    b,
    c,
    SIMILARITY: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute dq += ds k over keys start..stop, without the slope, for queries q with gradients dout."""
    # Over 60 lines: half of them are the signature, and a loop's body cannot leave the loop.
    offs_n, offs_d, offs_dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for n0 in tl.range(start, stop, BLOCK_N):
        keys = n0 + offs_n
        mask_n = keys
        if MASKED:
            mask_n = load_key_mask(key_mask_ptr, keys, end, KEY_MASK)
        k = load_tile(k_ptr, n0, stride_kt, mask_n, offs_n, offs_d, D, MASKED, EVEN_D)
        v = load_tile(v_ptr, n0, stride_vt, mask_n, offs_n, offs_dv, M, MASKED, EVEN_DV)
        # [BLOCK_T, D] @ [D, BLOCK_N] -> [BLOCK_T, BLOCK_N]
        t = dot(q, tl.trans(k), None, PRECISION)
        # [BLOCK_T, DV] @ [DV, BLOCK_N] -> [BLOCK_T, BLOCK_N]
        g = dot(dout, tl.trans(v), None, PRECISION)
        if SIMILARITY == "softmax":
            g -= delta[:, None]
        elif NORMALIZE:
            g = g * norm[:, None] - (delta * norm)[:, None]
        visible = mask_n[None, :]
        if MASKED and CAUSAL:
            visible = visible & (keys[None, :] <= last_key[:, None])
        _, ds = recompute_p_and_ds(t, g, norm[:, None], visible, a, b, c, SIMILARITY, MASKED, NORMALIZE)
        # [BLOCK_T, BLOCK_N] @ [BLOCK_N, D] -> [BLOCK_T, D]
        dq = dot(round_to(ds, IN_DTYPE), k, dq, PRECISION)
    return dq


@triton.jit
def accumulate_dkv(
    dk,
    dv,
    k,
    v,
    keys,
    q_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    start,
    stop,
    end,
    q_offset,
    stride_qt,
    stride_dot,
    D,
    M,
    a,
    b,
    c,
    SIMILARITY: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    IN_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute dk += ds^T q, without the slope, and dv += p^T dout over queries start..stop, for keys k
    [BLOCK_N, BLOCK_D] and values v. Score tiles are transposed: [BLOCK_N, BLOCK_T].

    MASKED: some scores are hidden by causality. RAGGED: queries from `end` on do not exist; q and dout are loaded as 0
    there, so that they add nothing. dk and dv of keys that do not count may hold anything: store zeros there.
    """
    # Over 60 lines: half of them are the signature, and a loop's body cannot leave the loop.
    offs_t, offs_d, offs_dv = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for t0 in tl.range(start, stop, BLOCK_T):
        queries = t0 + offs_t
        mask_t = queries < end
        q = load_tile(q_ptr, t0, stride_qt, mask_t, offs_t, offs_d, D, RAGGED, EVEN_D)
        dout = load_tile(dout_ptr, t0, stride_dot, mask_t, offs_t, offs_dv, M, RAGGED, EVEN_DV)
        norm, delta = queries, queries
        if NORMALIZE and RAGGED:
            norm = tl.load(norm_ptr + queries, mask=mask_t, other=float("inf") if SIMILARITY == "softmax" else 0.0)
            delta = tl.load(delta_ptr + queries, mask=mask_t, other=0.0)
        elif NORMALIZE:
            norm = tl.load(norm_ptr + queries)
            delta = tl.load(delta_ptr + queries)
        # [BLOCK_N, D] @ [D, BLOCK_T] -> [BLOCK_N, BLOCK_T]
        t = dot(k, tl.trans(q), None, PRECISION)
        g = t
        if NEEDS_DK:
            g = tl.zeros([k.shape[0], BLOCK_T], tl.float32)
            if NORMALIZE:
                g -= delta[None, :]  # before the product, so that delta needs no registers during it
            # [BLOCK_N, DV] @ [DV, BLOCK_T] -> [BLOCK_N, BLOCK_T]
            g = dot(v, tl.trans(dout), g, PRECISION)
            if NORMALIZE and SIMILARITY != "softmax":
                g *= norm[None, :]
        visible = keys[:, None] <= queries[None, :] + q_offset
        p, ds = recompute_p_and_ds(t, g, norm[None, :], visible, a, b, c, SIMILARITY, MASKED, NORMALIZE)
        if NEEDS_DV:
            # [BLOCK_N, BLOCK_T] @ [BLOCK_T, DV] -> [BLOCK_N, DV]
            dv = dot(round_to(p, IN_DTYPE), dout, dv, PRECISION)
        if NEEDS_DK:
            # [BLOCK_N, BLOCK_T] @ [BLOCK_T, D] -> [BLOCK_N, D]
            dk = dot(round_to(ds, IN_DTYPE), q, dk, PRECISION)
    return dk, dv
