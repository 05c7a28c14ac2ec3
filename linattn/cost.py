"""Count what an attention call costs, from its sizes alone: flops, bytes, memory, and where the linear form pays.

Conventions: a multiply-add counts as 2 flops; exponentials, masks and other elementwise work count as 0. `c` is the
chunk length, `F` the number of features, D the head size of queries and keys, M that of values. Per token and head, in
the forward pass:

    direct     2 N (D + M)          half of it when causal
    linear     4 F (M + 1)          half to fold a key into the state, half to read it; the 1 is the normaliser
    chunked    linear + c (D + M)   causal only: the keys of a query's own chunk are read directly

Sizes may be plain integers or `torch.SymInt`: nothing here turns them into numbers. Sources: Katharopoulos et al. 2020,
"Transformers are RNNs" (linear form); Arora et al. 2024, "Simple linear attention language models balance the
recall-throughput tradeoff" (degree-2 features).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linattn.errors import ArgumentError, unknown_name

Kernel = Literal["softmax", "quadratic", "feature_map"]
Form = Literal["direct", "chunked", "recurrent"]
Count = Literal["textbook", "dedup", "implemented"]

FORMS_OF_KERNEL: dict[str, tuple[str, ...]] = {
    "softmax": ("direct",),
    "quadratic": ("direct", "chunked", "recurrent"),
    "feature_map": ("direct", "chunked", "recurrent"),
}
ROW_BLOCK = 8
"""Width of the blocks of rows in which the reference path lays out products x_i x_j with i >= j."""
STATE_ITEMSIZE = 4
"""States and row sums are float32 (float64 only for float64 inputs)."""


@dataclass(frozen=True)
class Cost:
    """The predicted cost of one call, summed over batch and heads.

    Attributes:
        kernel, form: what was counted.
        flops: by the formulas on top of this module, features without duplicates.
        flops_implemented: what the reference path computes: padded features, whole tiles on the causal diagonal.
        bytes_moved: traffic with main memory when every tensor crosses once and the state crosses once a chunk.
        memory_bytes: inputs, results and working memory held at the same time.
    """

    kernel: Kernel
    form: Form
    flops: int
    flops_implemented: int
    bytes_moved: int
    memory_bytes: int

    @property
    def intensity(self) -> float:
        """Flops done for each byte moved."""
        return self.flops / self.bytes_moved


def feature_count(D: int) -> int:
    """Distinct features of the quadratic kernel: C(D) = (D + 1)(D + 2) / 2.

    They are the constant, D linear terms and the D (D + 1) / 2 products x_i x_j with i >= j of (1 + q.k)^2.

    Example:
        >>> [feature_count(D) for D in (16, 32, 64, 128)]
        [153, 561, 2145, 8385]
    """
    return (D + 1) * (D + 2) // 2


def padded_feature_count(D: int) -> int:
    """Features that the reference path computes: 1 + D + sum over blocks a = 0, 1, ... of 8 * 8 (a + 1) products.

    A block of 8 rows, or of what is left of D, holds every column up to its own end: pairs inside it appear twice.

    Example:
        >>> padded_feature_count(64)
        2369
    """
    blocks, left = divmod(D, ROW_BLOCK)
    return 1 + D + ROW_BLOCK * ROW_BLOCK * blocks * (blocks + 1) // 2 + left * D


def state_size(kernel: Kernel, D: int, M: int, *, features: int | None = None) -> int:
    """Numbers in the state of one head: C M + D^2 + D for the quadratic kernel, F (M + 1) for a feature map.

    This is what decoding keeps in place of all keys and values, which take T (D + M).

    Raises:
        ArgumentError: the kernel has no state (softmax), or its name is unknown.

    Example:
        >>> state_size("quadratic", 64, 64)
        141440
    """
    _check(kernel, "recurrent", D, M, is_causal=True)
    if kernel == "quadratic":
        return feature_count(D) * M + D * D + D
    return _features(kernel, D, features) * (M + 1)


def fold_length(D: int, M: int | None = None, *, itemsize: int = 4) -> float:
    """Number of keys from which decoding with the quadratic kernel does better to keep the state than the keys.

        keys    T (D + M) itemsize bytes are read for a token
        state   2 (C M + D^2 + D) 4 bytes are read and written

    Decoding is bound by memory, so the bytes decide. For M = D in fp32 this is a little above C. At half this length
    the state already takes no more room than the keys.

    Args:
        D: head size of keys.
        M: head size of values; D when not given.
        itemsize: bytes of one entry of a key.

    Example:
        >>> fold_length(64), fold_length(64, itemsize=2)
        (2210.0, 4420.0)
    """
    M = D if M is None else M
    return 2 * state_size("quadratic", D, M) * STATE_ITEMSIZE / ((D + M) * itemsize)


def flops(
    kernel: Kernel,
    form: Form,
    *,
    B: int,
    H: int,
    N: int,
    D: int,
    M: int,
    keys: int | None = None,
    is_causal: bool = False,
    chunk: int = 512,
    features: int | None = None,
    backward: bool = False,
) -> int:
    """Flops of one pass by the formulas on top of this module.

    The backward pass takes 5 matrix products where the forward pass takes 2. Direct: S again, dP, dQ, dK, dV, which is
    N (6 D + 4 M) a token. Linear: the state again, its gradient, dQ, dK, dV.

    Args:
        kernel: "quadratic" or "feature_map".
        form: "direct", "chunked" or "recurrent" (`FORMS_OF_KERNEL`).
        B: batch.
        H: query heads.
        N: queries. May be a `torch.SymInt`.
        D: head size of queries.
        M: head size of values.
        keys: number of keys, N when not given. With is_causal: the queries are the last N of them, so `keys >= N`.
        is_causal: query i sees keys up to its own position.
        chunk: chunk length of the causal chunked form; 0 leaves the inside of chunks out.
        features: features of the feature map, D when not given.
        backward: count the backward pass instead of the forward one.

    Raises:
        ArgumentError: an unknown name, a form that the kernel does not have, `recurrent` without `is_causal`, or a head
            size below 1.

    Example:
        >>> flops("quadratic", "direct", B=1, H=1, N=100, D=8, M=8)
        320000
    """
    _check(kernel, form, D, M, is_causal)
    K = _key_count(N, keys, is_causal)
    score, value = (6, 4) if backward else (2, 2)
    if form == "direct":
        twice_pairs = (2 * (K - N) + N) * N if is_causal else 2 * N * K
        return B * H * (twice_pairs * (score * D + value * M) // 2)
    linear = (5 if backward else 2) * _features(kernel, D, features) * (M + 1)
    inside = N * chunk * (score * D + value * M) // 2 if form == "chunked" and is_causal else 0
    return B * H * ((N + K) * linear + inside)


def flops_implemented(  # noqa: PLR0913 (sizes and options, all by name)
    kernel: Kernel,
    form: Form,
    *,
    B: int,
    H: int,
    N: int,
    D: int,
    M: int,
    keys: int | None = None,
    is_causal: bool = False,
    chunk: int = 512,
    tile: int = 512,
    features: int | None = None,
    backward: bool = False,
) -> int:
    """Flops of one pass as the reference path does it; arguments, errors and the rest as for `flops`.

    What differs: on the causal diagonal tiles (`tile` long) and chunks are computed whole; the quadratic kernel's
    features are padded (`padded_feature_count`) and cost one multiply each to make; its normaliser uses a D x D matrix.
    """
    _check(kernel, form, D, M, is_causal)
    K = _key_count(N, keys, is_causal)
    score, value = (6, 4) if backward else (2, 2)
    if form == "direct":
        twice_pairs = (2 * (K - N) + N + tile) * N if is_causal else 2 * N * K
        return B * H * (twice_pairs * (score * D + value * M) // 2)
    linear = _linear_implemented(kernel, D, M, features) * (5 if backward else 2) // 2
    inside = N * chunk * (score * D + value * M) if form == "chunked" and is_causal else 0
    return B * H * ((N + K) * linear + inside)


def attention_cost(  # noqa: PLR0913 (sizes and options, all by name)
    kernel: Kernel,
    form: Form,
    *,
    B: int,
    H: int,
    N: int,
    D: int,
    M: int | None = None,
    keys: int | None = None,
    is_causal: bool = False,
    chunk: int = 512,
    tile: int = 512,
    itemsize: int = 4,
    features: int | None = None,
    training: bool = False,
    recompute: bool = True,
) -> Cost:
    """Work out everything that is known about a call from its sizes.

    Memory is O(N (D + M)) for inputs and results, plus one tile (direct) or one state and one tile (chunked) a head.
    Training doubles all of it, for the gradients; the chunked causal form adds ceil(N / c) prefix states unless it
    recomputes them, as the reference path does.

    Args:
        kernel: "quadratic" or "feature_map".
        form: "direct", "chunked" or "recurrent" (`FORMS_OF_KERNEL`).
        B: batch.
        H: query heads.
        N: queries.
        D: head size of queries.
        M: head size of values, D when not given.
        keys: number of keys, N when not given.
        is_causal: query i sees keys up to its own position.
        chunk: chunk length of the causal chunked form.
        features: features of the feature map, D when not given.
        tile: length of the square tiles of the reference path.
        itemsize: bytes of one input element.
        training: add the backward pass, and hold gradients and saved tensors.
        recompute: no prefix states are saved for the backward pass.

    Returns:
        A `Cost`, summed over batch and heads.

    Raises:
        ArgumentError: as for `flops`; also a chunk or tile below 1.

    Example:
        >>> attention_cost("quadratic", "chunked", B=1, H=8, N=65536, D=64, is_causal=True, chunk=1024).flops
        361114894336
    """
    M = D if M is None else M
    K = N if keys is None else keys
    if chunk < 1 or tile < 1:
        raise ArgumentError(f"attention_cost got chunk={chunk}, tile={tile}; accepted: integers of at least 1")
    sizes: dict[str, Any] = {"B": B, "H": H, "N": N, "D": D, "M": M, "keys": keys}
    options: dict[str, Any] = {"is_causal": is_causal, "chunk": chunk, "features": features}
    passes = (False, True) if training else (False,)
    textbook = sum(flops(kernel, form, backward=p, **sizes, **options) for p in passes)
    implemented = sum(flops_implemented(kernel, form, tile=tile, backward=p, **sizes, **options) for p in passes)

    tensors = (N + K) * (D + M) * itemsize
    row_sums = N * STATE_ITEMSIZE
    state = 0 if form == "direct" else state_size(kernel, D, M, features=features) * STATE_ITEMSIZE
    chunks = -(-K // chunk) if form == "chunked" and is_causal else 1

    # Backward reads every tensor and the output's gradient, writes three gradients, carries the state and its gradient.
    moved = tensors + row_sums + 2 * chunks * state
    if training:
        moved += 2 * tensors + 2 * row_sums + 4 * chunks * state
    held = tensors + row_sums + state + (0 if form == "recurrent" else tile * tile * STATE_ITEMSIZE)
    if training:
        held *= 2
        if form == "chunked" and is_causal and not recompute:
            held += chunks * state
    return Cost(kernel, form, textbook, implemented, B * H * moved, B * H * held)


def crossover(
    D: int, M: int | None = None, *, is_causal: bool = False, chunk: int = 0, count: Count = "dedup"
) -> float:
    """Length N* from which the quadratic kernel's chunked form takes fewer flops than its direct form.

        textbook      D^2 M / max(D, M)      O(N^2 max(D, M)) against O(N D^2 M), duplicates kept: N > D^2
        dedup         2 C M / (D + M)        C for M = D, about D^2 / 2
                      4 C M / (D + M) + c    causal: 2 C + c for M = D, about D^2 + 3 D + c
        implemented   the same balance for the reference path's padded features, their making, and its normaliser,
                      tiles as long as chunks

    Args:
        D: head size of queries.
        M: head size of values; D when not given.
        is_causal: the direct form then does half the work.
        chunk: chunk length c of the causal chunked form; 0 counts an ideal one.
        count: which flops.

    Raises:
        ArgumentError: an unknown count, sizes below 1.

    Example:
        >>> crossover(64), crossover(64, is_causal=True), crossover(64, count="textbook")
        (2145.0, 4290.0, 4096.0)
    """
    M = D if M is None else M
    _check("quadratic", "chunked", D, M, is_causal)
    if count == "textbook":
        return D * D * M / max(D, M)
    if count == "dedup":
        linear = 4 * feature_count(D) * M
    elif count == "implemented":
        linear = 2 * _linear_implemented("quadratic", D, M, None)
    else:
        raise unknown_name("count", count, ("textbook", "dedup", "implemented"))
    # What computing tiles on the diagonal whole adds, c (D + M), is added on both sides.
    return linear / (D + M) + chunk if is_causal else linear / (2 * (D + M))


def _features(kernel: Kernel, D: int, features: int | None) -> int:
    return feature_count(D) if kernel == "quadratic" else D if features is None else features


def _key_count(N: int, keys: int | None, is_causal: bool) -> int:
    if keys is None:
        return N
    if is_causal and keys < N:
        raise ArgumentError(
            f"causal cost got N={N}, keys={keys}; accepted: queries are the last N of the keys, keys >= N"
        )
    return keys


def _linear_implemented(kernel: Kernel, D: int, M: int, features: int | None) -> int:
    """Flops to fold one key into the state, equal to those of reading it with one query."""
    if kernel == "feature_map":
        return 2 * _features(kernel, D, features) * (M + 1)
    padded = padded_feature_count(D)
    return 2 * padded * M + padded + 2 * (D * D + D + 1)


def _check(kernel: str, form: str, D: int, M: int, is_causal: bool) -> None:
    if kernel not in FORMS_OF_KERNEL:
        raise unknown_name("kernel", kernel, FORMS_OF_KERNEL)
    if form not in FORMS_OF_KERNEL["quadratic"]:
        raise unknown_name("form", form, FORMS_OF_KERNEL["quadratic"])
    if form not in FORMS_OF_KERNEL[kernel]:
        accepted = ", ".join(map(repr, FORMS_OF_KERNEL[kernel]))
        raise ArgumentError(f"kernel {kernel!r} got form {form!r}, but has no state; accepted: {accepted}")
    if form == "recurrent" and not is_causal:
        raise ArgumentError("form 'recurrent' got is_causal=False; it takes keys in order: accepted: is_causal=True")
    if D < 1 or M < 1:
        raise ArgumentError(f"head sizes got D={D}, M={M}; accepted: integers of at least 1")
