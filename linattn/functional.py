"""The public operations. Each one checks a call and decides how it runs (linattn/_dispatch/plan.py), then runs it.

All take queries `[B, H, T, D]`, keys `[B, Hkv, Tk, D]` and values `[B, Hkv, Tk, M]` of any strides (a `[B, T, H, D]`
tensor is a `.transpose(1, 2)` view and is never copied) in fp16, bf16, fp32 or fp64, and return `[B, H, T, M]` in the
same dtype. Sums are accumulated in fp32 (fp64 for fp64 inputs). Errors are raised before any kernel runs (what a `sim`
or a callable feature map returns is checked when it does). There is no rule for `torch.func.vmap`: batch by B and H.
"""

# Over 400 lines, most of them the documentation of eight public functions that are read side by side.

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from linattn._dispatch import checks
from linattn._dispatch import plan as dispatch
from linattn._dispatch.explain import explain as explain
from linattn._dispatch.plan import TAYLOR as TAYLOR
from linattn.errors import ArgumentError, refusal
from linattn.kernels.custom_similarity import autograd as custom_similarity
from linattn.kernels.feature_map.autograd import feature_map as run_feature_map
from linattn.kernels.quadratic.autograd import quadratic as run_quadratic
from linattn.kernels.quadratic.autograd import row_sums
from linattn.kernels.quadratic.contract import Options as QuadraticOptions
from linattn.kernels.softmax.autograd import softmax as run_softmax
from linattn.states import FeatureMapState, QuadraticState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Unpack

    from linattn._dispatch.checks import Form
    from linattn.feature_maps import FeatureMap


class StatefulKeywords(TypedDict, total=False):
    """The options of operations with a state, for type checkers; `return_state` stands apart: it decides the result."""

    is_causal: bool
    scale: float
    normalize: bool
    key_mask: Tensor | None
    q_offset: int | None
    enable_gqa: bool
    cu_seqlens: Tensor | None
    form: Form
    backend: str


class QuadraticKeywords(StatefulKeywords, total=False):
    """Those of `quadratic_attention`."""

    coefficients: Sequence[float]
    initial_state: QuadraticState | None


class LinearKeywords(StatefulKeywords, total=False):
    """Those of `linear_attention`."""

    feature_map: FeatureMap
    initial_state: FeatureMapState | None


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax attention.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
        >>> softmax_attention(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 16, 8])

    For each query i

        out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),    s_ij = scale * q_i.k_j

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        v: values `[B, Hkv, Tk, M]`, of the same dtype.
        is_causal: query i sees keys j <= i + q_offset.
        scale: factor of the scores; None means 1/sqrt(D).
        key_mask: bool `[B, Tk]`, True for keys that count; a query that sees no key gives 0 and zero gradient.
        q_offset: the causal alignment; may be left out when T = Tk, then 0.
        enable_gqa: allow fewer key heads: H a multiple of Hkv.
        cu_seqlens: int32 or int64 `[S + 1]`: S sequences end to end in one row (B = 1), each attending to itself.
        backend: "auto" always finds a path; a named one runs or raises BackendError. "torch" is
            `F.scaled_dot_product_attention`, "reference" and "triton" also take masks, packed sequences and M != D.

    Returns:
        out `[B, H, T, M]`.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit each other.
        ArgumentError: an option is not accepted, or options contradict each other.
        BackendError: a named backend cannot run this call.

    Complexity: time O(T Tk (D + M)), memory O(T (D + M)). Source: Vaswani et al. 2017; Dao et al. 2022 for the memory.
    """
    _, inputs, scale, _, _, plan = dispatch.prepare_softmax(
        q,
        k,
        v,
        is_causal=is_causal,
        scale=scale,
        key_mask=key_mask,
        q_offset=q_offset,
        enable_gqa=enable_gqa,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return run_softmax(
        inputs.q,
        inputs.k,
        inputs.v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        is_causal=is_causal,
        q_offset=inputs.q_offset,
        scale=scale,
        backend=plan.backend,
    )


@overload
def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[False] = False, **options: Unpack[QuadraticKeywords]
) -> Tensor: ...
@overload
def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options: Unpack[QuadraticKeywords]
) -> tuple[Tensor, QuadraticState]: ...
@overload
def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: bool, **options: Unpack[QuadraticKeywords]
) -> Tensor | tuple[Tensor, QuadraticState]: ...
def quadratic_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float = 1.0,
    coefficients: Sequence[float] = (1, 2, 1),
    normalize: bool = True,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: QuadraticState | None = None,
    return_state: bool = False,
    form: Form = "auto",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, QuadraticState]:
    """Compute quadratic-kernel attention, (1 + s)^2 by default.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
        >>> whole = quadratic_attention(q, k, v, is_causal=True, scale=8**-0.5)
        >>> first, state = quadratic_attention(
        ...     q[:, :, :20], k[:, :, :20], v[:, :, :20], is_causal=True, scale=8**-0.5, return_state=True)
        >>> rest = quadratic_attention(
        ...     q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], is_causal=True, scale=8**-0.5, initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-4)
        True

    For each query i

        out_i = sum_j p(s_ij) v_j / l_i,    l_i = sum_j p(s_ij),    p(s) = c0 + c1 s + c2 s^2,    s_ij = scale * q_i.k_j

    The chunked form replaces keys by sums over C = (D+1)(D+2)/2 features, exactly, and pays from about T > D^2 on.

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        v: values `[B, Hkv, Tk, M]`, of the same dtype.
        is_causal: query i sees keys j <= i + q_offset.
        scale: factor of the scores; 1 because the kernel's definition has none. Models use 1/sqrt(D).
        coefficients: (c0, c1, c2), c2 != 0. (1, 2, 1) is (1 + s)^2, (1, 1, 0.5) the second-order Taylor kernel,
            (0, 0, 1) the symmetric power.
        normalize: divide by l; needs a p that is never negative.
        key_mask: bool `[B, Tk]`, True for keys that count; a query that sees no key gives 0 and zero gradient.
        q_offset: the causal alignment; may be left out when T = Tk, then 0.
        enable_gqa: allow fewer key heads: H a multiple of Hkv.
        cu_seqlens: int32 or int64 `[S + 1]`: S sequences end to end in one row (B = 1), each attending to itself.
        initial_state: sums over earlier keys (linattn.states); not causal: every query sees them and all keys.
        return_state: return `(out, state)`, with the sums over all keys.
        form: "direct" computes all scores, O(T Tk); "chunked" and "recurrent" go through the state, O(T); "auto" takes
            the faster one for this length (`explain` says which), so rounding changes there.
        backend: "auto" always finds a path; a named backend runs or raises BackendError.

    Returns:
        out `[B, H, T, M]`, or `(out, state)`.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit each other.
        ArgumentError: an option is not accepted, or options contradict each other.
        StateError: the state does not belong to these inputs.
        BackendError: a named backend cannot run this call.
        DoubleBackwardError: a second derivative is asked for; there is one only.

    Complexity: direct O(T Tk (D + M)) time; chunked and recurrent O((T + Tk) D^2 M) time, O(T (D + M) + D^2 M) memory.
    Numerics: (1 + s)^2 vanishes at s = -1, where a query loses digits in proportion to `quadratic_condition`; queries
    that have seen fewer than 16 keys are computed from their scores in every form. l <= 0 by cancellation gives 0 with
    zero gradient, although the limit of a query with one key is v_0: there is a jump.
    Sources: Katharopoulos et al. 2020 (linear form), Arora et al. 2024 (Taylor kernel), Kacham et al. 2023 (polynomial
        kernels).
    """
    _, inputs, options, before, _, plan = dispatch.prepare_quadratic(
        q,
        k,
        v,
        coefficients=coefficients,
        is_causal=is_causal,
        scale=scale,
        normalize=normalize,
        key_mask=key_mask,
        q_offset=q_offset,
        enable_gqa=enable_gqa,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        return_state=return_state,
        form=form,
        backend=backend,
    )
    out, state = run_quadratic(
        inputs.q,
        inputs.k,
        inputs.v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        initial_state=before,
        options=options,
        return_state=return_state,
        plan=plan,
    )
    return (out, QuadraticState(*state)) if return_state else out


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[False] = False, **options: Unpack[LinearKeywords]
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options: Unpack[LinearKeywords]
) -> tuple[Tensor, FeatureMapState]: ...
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: bool, **options: Unpack[LinearKeywords]
) -> Tensor | tuple[Tensor, FeatureMapState]: ...
def linear_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu+1",
    is_causal: bool = False,
    scale: float = 1.0,
    normalize: bool = True,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: FeatureMapState | None = None,
    return_state: bool = False,
    form: Form = "auto",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, FeatureMapState]:
    """Compute feature-map linear attention.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
        >>> out = linear_attention(q, k, v, feature_map="elu+1", is_causal=True)
        >>> same = linear_attention(q, k, v, feature_map=lambda x: torch.nn.functional.elu(x) + 1, is_causal=True)
        >>> torch.allclose(out, same, atol=1e-5)
        True

    For each query i

        out_i = sum_j p_ij v_j / l_i,    l_i = sum_j p_ij,    p_ij = scale * phi(q_i).phi(k_j)

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        v: values `[B, Hkv, Tk, M]`, of the same dtype.
        feature_map: a name of `linattn.feature_maps`, such as "elu+1", "dpfp", "favor+" ("identity" only with
            normalize=False; what learns or is random stands at its first values), or a callable or module that turns
            `[B, H, T, D]` into features `[B, H, T, C]`; parameters get gradients. With normalize=True phi(q).phi(k) is
            trusted to be non-negative, unless it has an attribute `positive` = False.
        is_causal: query i sees keys j <= i + q_offset.
        scale: factor of the similarity; without effect when normalize=True, and then it must be positive.
        normalize: divide by l. A query with l <= 0 (possible with "relu") gives 0 and zero gradient.
        key_mask: bool `[B, Tk]`, True for keys that count; a query that sees no key gives 0 and zero gradient.
        q_offset: the causal alignment; may be left out when T = Tk, then 0.
        enable_gqa: allow fewer key heads: H a multiple of Hkv.
        cu_seqlens: int32 or int64 `[S + 1]`: S sequences end to end in one row (B = 1), each attending to itself.
        initial_state: sums over earlier keys (linattn.states); not causal: every query sees them and all keys.
        return_state: return `(out, state)`, with the sums over all keys.
        form: "direct" computes all scores, O(T Tk); "chunked" and "recurrent" go through the state, O(T); "auto" takes
            the faster one for this length (`explain` says which), so rounding changes there.
        backend: "auto" always finds a path; a named backend runs or raises BackendError.

    Returns:
        out `[B, H, T, M]`, or `(out, state)`.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit each other.
        ArgumentError: an option is not accepted, or options contradict each other.
        StateError: the state does not belong to these inputs.
        BackendError: a named backend cannot run this call.
        DoubleBackwardError: a second derivative is asked for; there is one only.

    Complexity: direct O(T Tk (C + M)) time; chunked and recurrent O((T + Tk) C M) time, O(T (C + M) + C M) memory.
    Source: Katharopoulos et al. 2020.
    """
    _, inputs, options, before, _, plan = dispatch.prepare_linear(
        q,
        k,
        v,
        feature_map=feature_map,
        is_causal=is_causal,
        scale=scale,
        normalize=normalize,
        key_mask=key_mask,
        q_offset=q_offset,
        enable_gqa=enable_gqa,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        return_state=return_state,
        form=form,
        backend=backend,
    )
    out, state = run_feature_map(
        inputs.q,
        inputs.k,
        inputs.v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        initial_state=before,
        options=options,
        return_state=return_state,
        plan=plan,
    )
    return (out, FeatureMapState(*state)) if return_state else out


def kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, sim: Callable[[Tensor, Tensor], Tensor], is_causal: bool = False
) -> Tensor:
    """Compute attention with any similarity.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
        >>> out = kernel_attention(q, k, v, sim=lambda q, k: (q @ k.mT).exp())
        >>> torch.allclose(out, softmax_attention(q, k, v, scale=1.0), atol=1e-5)
        True

    For each query i

        out_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        v: values `[B, Hkv, Tk, M]`, of the same dtype.
        sim: `sim(q_tile [B, H, tq, D], k_tile [B, H, tk, D]) -> [B, H, tq, tk]`, non-negative: a negative value is an
            ArgumentError on CPU and an asynchronous assertion on CUDA. Its parameters get gradients.
        is_causal: query i sees keys j <= i.

    Returns:
        out `[B, H, T, M]`; 0 for a query whose similarities are all 0.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit each other.
        ArgumentError: an option is not accepted, or options contradict each other.

    Complexity: O(T Tk) calls of sim's cost, memory O(T (D + M)) and one tile: tiles are recomputed in the backward
    pass. Numerics: `sim` also sees the scores that is_causal hides: an overflow there makes gradients NaN. Can be
    differentiated any number of times; compiled once for each length.
    Source: Tsai et al. 2019, "Transformer dissection"; Katharopoulos et al. 2020.
    """
    inputs = checks.check_inputs(q, k, v, is_causal=is_causal)
    if not callable(sim):
        raise refusal(ArgumentError, "sim must be callable", given=repr(sim), accepted="sim(q_tile, k_tile) -> scores")
    return custom_similarity.kernel_attention(inputs.q, inputs.k, inputs.v, sim, is_causal)


def argmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Look up the value of the best key.

    Example:
        >>> k = torch.tensor([[1.0, 2, 0], [0, 3, 4], [5, 0, 0], [0, 0, 1]]).view(1, 1, 4, 3)
        >>> v = torch.tensor([[2.0, 0, 1], [1, 4, 3], [0, -1, 4], [1, 0, -1]]).view(1, 1, 4, 3)
        >>> argmax_attention(torch.tensor([1.0, 1, 2]).view(1, 1, 1, 3), k, v).flatten().tolist()
        [1.0, 4.0, 3.0]

    For each query i

        out_i = v_j,    j = argmax_j q_i.k_j    (the first of equals)

    The limit of softmax attention at falling temperature. Its gradient to q and k is zero wherever it exists, so
    queries and keys cannot learn; values can. NaN scores never win.

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        v: values `[B, Hkv, Tk, M]`, of the same dtype.

    Returns:
        out `[B, H, T, M]`.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit each other.

    Complexity: time O(T Tk D), memory O(T M) and one tile; compiled once for each length.
    """
    inputs = checks.check_inputs(q, k, v)
    return custom_similarity.argmax_attention(inputs.q, inputs.k, inputs.v)


def attention(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "softmax", **options: Any) -> Any:
    """Compute any attention of this library by name.

    Example:
        >>> q = k = v = torch.randn(1, 2, 16, 8)
        >>> torch.equal(attention(q, k, v, kernel="quadratic"), quadratic_attention(q, k, v))
        True

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        v: values `[B, Hkv, Tk, M]`, of the same dtype.
        kernel: "softmax", "quadratic", "taylor" (the quadratic kernel with coefficients (1, 1, 0.5) and scale
            1/sqrt(D)), or the name of a feature map: "elu+1", "dpfp" and the others of `linattn.feature_maps`.
        **options: those of `softmax_attention`, `quadratic_attention` or `linear_attention`, with their defaults.

    Returns:
        out `[B, H, T, M]`, or `(out, state)` with return_state=True.

    Raises:
        ArgumentError: an unknown name, or an option that this kernel does not have.
        LinattnError: what the function behind the name raises.
    """
    op, _, defaults = dispatch.resolve(kernel, q, options)
    options = {**defaults, **options}
    if op == "softmax":
        return softmax_attention(q, k, v, **options)
    return quadratic_attention(q, k, v, **options) if op == "quadratic" else linear_attention(q, k, v, **options)


def quadratic_condition(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool = False,
    scale: float = 1.0,
    coefficients: Sequence[float] = (1, 2, 1),
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute how ill-conditioned each query of `quadratic_attention` is, for debugging.

    Example:
        >>> q = torch.ones(1, 1, 1, 2)
        >>> quadratic_condition(q, -0.45 * q).item() > 100    # s = -0.9
        True

    For each query i, with |c0|, |c1|, |c2| in the numerator

        kappa_i = sum_j p(|s|_ij) / sum_j p(s_ij),    |s|_ij = |scale| |q_i|.|k_j|

    The relative error of query i is about kappa_i times the rounding unit. kappa is near 1 for positive scores and
    grows without bound as the scores of a query approach -1, where (1 + s)^2 vanishes.

    Args:
        q: queries `[B, H, T, D]` of any strides, in fp16, bf16, fp32 or fp64.
        k: keys `[B, Hkv, Tk, D]`, of the same dtype.
        is_causal: query i sees keys j <= i + q_offset.
        scale: factor of the scores.
        coefficients: (c0, c1, c2) of p, which must never be negative.
        key_mask: bool `[B, Tk]`, True for keys that count.
        q_offset: the causal alignment; may be left out when T = Tk, then 0.
        enable_gqa: allow fewer key heads: H a multiple of Hkv.
        cu_seqlens: int32 or int64 `[S + 1]`: S sequences end to end in one row (B = 1), each attending to itself.

    Returns:
        kappa `[B, H, T]`, without gradient; infinite for a query whose sum vanishes or that sees no key.

    Raises:
        ShapeError, DtypeError, DeviceError: the tensors do not fit each other.
        ArgumentError: an option is not accepted, or options contradict each other.

    Complexity: time O(T Tk D), memory O(T).
    """
    inputs = checks.check_inputs(
        q, k, k, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    c0, c1, c2 = checks.check_coefficients(coefficients, normalize=True)
    scale = checks.check_scale(scale)
    actual = QuadraticOptions(is_causal, inputs.q_offset, scale, c0, c1, c2, normalize=False)
    bound = actual._replace(scale=abs(scale), c0=abs(c0), c1=abs(c1), c2=abs(c2))
    with torch.no_grad():
        sums = row_sums(inputs.q, inputs.k, key_mask, cu_seqlens, actual)
        bounds = row_sums(inputs.q.abs(), inputs.k.abs(), key_mask, cu_seqlens, bound)
    return (bounds / sums).masked_fill(sums <= 0, math.inf)
