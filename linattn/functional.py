"""The public operations. Each one checks, chooses a backend and a form, and calls the kernel.

All take queries `[B, H, T, D]`, keys `[B, Hkv, Tk, D]` and values `[B, Hkv, Tk, M]` of any strides (a `[B, T, H, D]`
tensor is a `.transpose(1, 2)` view and is never copied) in fp16, bf16, fp32 or fp64, and return `[B, H, T, M]` in the
same dtype. Sums are accumulated in fp32 (fp64 for fp64 inputs). Arguments that several of them share:

    is_causal      query i sees keys j <= i + q_offset
    q_offset       the causal alignment; may be left out when T = Tk, then 0
    key_mask       bool `[B, Tk]`, True for keys that count; a row that sees no key gives 0 and zero gradient
    enable_gqa     allows fewer key heads: H a multiple of Hkv
    cu_seqlens     int32 or int64 `[S + 1]`: S sequences end to end in one row (B = 1), each attending to itself
    initial_state  sums over earlier keys (linattn.states); not causal: every query sees them and all keys
    return_state   return `(out, state)` with the sums over all keys
    form           "direct" computes all scores, O(T Tk); "chunked" and "recurrent" go through the state, O(T);
                   "auto" takes the faster one for this length (`explain` says which), so rounding changes there
    backend        "auto" always finds a path; a named backend runs or raises BackendError

Raises, before any kernel runs (what a `sim` or a callable feature map returns is checked when it does): ShapeError,
DtypeError, DeviceError, ArgumentError, StateError, BackendError. There is no rule for `torch.func.vmap`: batch by B
and H.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from linattn import cost
from linattn._dispatch import checks
from linattn._dispatch import plan as dispatch
from linattn.errors import ArgumentError, ShapeError, unknown_name
from linattn.feature_maps import NAMES, FeatureMap, mapped
from linattn.kernels.common.op.allocation import accumulation_dtype
from linattn.kernels.common.op.varlen import sequence_bounds
from linattn.kernels.custom_similarity import autograd as _general
from linattn.kernels.feature_map.autograd import feature_map as _feature_map
from linattn.kernels.feature_map.contract import Options as FeatureMapOptions
from linattn.kernels.feature_map.contract import state_shapes as _feature_map_shapes
from linattn.kernels.quadratic.autograd import quadratic as _quadratic
from linattn.kernels.quadratic.autograd import row_sums as _quadratic_row_sums
from linattn.kernels.quadratic.contract import Options as QuadraticOptions
from linattn.kernels.quadratic.contract import state_shapes as _quadratic_shapes
from linattn.kernels.softmax.autograd import softmax as _softmax
from linattn.states import FeatureMapState, QuadraticState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Unpack

    from linattn._dispatch.checks import Form

TAYLOR = (1.0, 1.0, 0.5)


class StatefulKeywords(TypedDict, total=False):
    """What the operations with a state take, for type checkers; `return_state` stands apart: it decides the result."""

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
    coefficients: Sequence[float]
    initial_state: QuadraticState | None


class LinearKeywords(StatefulKeywords, total=False):
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
    """Softmax attention.

        out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),    s_ij = scale * q_i.k_j

    Args:
        scale: factor of the scores; None means 1/sqrt(D).
        The rest: see the top of this module.

    Complexity: time O(T Tk (D + M)), memory O(T (D + M)). Backend "torch" is `F.scaled_dot_product_attention`;
        "reference" also takes masks, packed sequences and M != D. Source: Vaswani et al. 2017; Dao et al. 2022 for the
        memory.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
        >>> softmax_attention(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 16, 8])
    """
    inputs = checks.check_inputs(
        q, k, v, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else checks.checked_scale(scale)
    return _softmax(
        inputs.q,
        inputs.k,
        inputs.v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        is_causal=is_causal,
        q_offset=inputs.q_offset,
        scale=scale,
        backend=dispatch.softmax_backend(backend, inputs),
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
def quadratic_attention(
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
    """Quadratic-kernel attention, (1 + s)^2 by default.

        out_i = sum_j p(s_ij) v_j / l_i,    l_i = sum_j p(s_ij),    p(s) = c0 + c1 s + c2 s^2,    s_ij = scale * q_i.k_j

    The chunked form replaces keys by sums over C = (D+1)(D+2)/2 features, exactly, and pays from about T > D^2 on.

    Args:
        scale: factor of the scores; 1 because the kernel's definition has none. Models use 1/sqrt(D).
        coefficients: (c0, c1, c2), c2 != 0. (1, 2, 1) is (1 + s)^2, (1, 1, 0.5) the second-order Taylor kernel,
            (0, 0, 1) the symmetric power.
        normalize: divide by l; needs a p that is never negative.
        The rest: see the top of this module.

    Complexity: direct O(T Tk (D + M)) time; chunked and recurrent O((T + Tk) D^2 M) time, O(T (D + M) + D^2 M) memory.
    Numerics: (1 + s)^2 vanishes at s = -1, where a row loses digits in proportion to `quadratic_condition`; rows that
    have seen fewer than 16 keys are computed from their scores in every form. l <= 0 by cancellation gives 0 with zero
    gradient, although the limit of a row with one key is v_0: there is a jump. One derivative only
    (DoubleBackwardError).
    Sources: Katharopoulos et al. 2020 (linear form), Arora et al. 2024 (Taylor kernel), Kacham et al. 2023 (polynomial
        kernels).

    Example:
        >>> q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
        >>> whole = quadratic_attention(q, k, v, is_causal=True, scale=8**-0.5)
        >>> first, state = quadratic_attention(
        ...     q[:, :, :20], k[:, :, :20], v[:, :, :20], is_causal=True, scale=8**-0.5, return_state=True)
        >>> rest = quadratic_attention(
        ...     q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], is_causal=True, scale=8**-0.5, initial_state=state)
        >>> torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-4)
        True
    """
    inputs = checks.check_inputs(
        q, k, v, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    checks.check_form(form, is_causal)
    shapes = _quadratic_shapes(inputs.sequences, k.shape[1], k.shape[3], v.shape[3])
    before = checks.check_state(initial_state, QuadraticState, shapes, accumulation_dtype(inputs.q.dtype), q.device)
    options = QuadraticOptions(
        is_causal,
        inputs.q_offset,
        checks.checked_scale(scale),
        *checks.checked_coefficients(coefficients, normalize),
        normalize,
    )
    plan = dispatch.plan("quadratic", inputs, form, backend, return_state or bool(before))
    out, state = _quadratic(
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
def linear_attention(
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
    """Feature-map linear attention.

        out_i = sum_j p_ij v_j / l_i,    l_i = sum_j p_ij,    p_ij = scale * phi(q_i).phi(k_j)

    Args:
        feature_map: a name of `linattn.feature_maps`, such as "elu+1", "dpfp", "favor+" ("identity" only with
            normalize=False; what learns or is random stands at its first values), or a callable or module that turns
            `[B, H, T, D]` into features `[B, H, T, C]`; parameters get gradients. With normalize=True phi(q).phi(k) is
            trusted to be non-negative, unless it has an attribute `positive` = False.
        scale: factor of the similarity; without effect when normalize=True, and then it must be positive.
        normalize: divide by l. A row with l <= 0 (possible with "relu") gives 0 and zero gradient.
        The rest: see the top of this module.

    Complexity: direct O(T Tk (C + M)) time; chunked and recurrent O((T + Tk) C M) time, O(T (C + M) + C M) memory.
    One derivative only (DoubleBackwardError). Source: Katharopoulos et al. 2020.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
        >>> out = linear_attention(q, k, v, feature_map="elu+1", is_causal=True)
        >>> same = linear_attention(q, k, v, feature_map=lambda x: torch.nn.functional.elu(x) + 1, is_causal=True)
        >>> torch.allclose(out, same, atol=1e-5)
        True
    """
    inputs = checks.check_inputs(
        q, k, v, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    checks.check_form(form, is_causal)
    scale = checks.checked_scale(scale)
    if normalize and scale <= 0:
        raise ArgumentError(f"normalize=True needs a positive scale, or the similarity is negative; given: {scale}")
    fq, fk, name = mapped(inputs.q, inputs.k, feature_map, normalize, key_mask)
    inputs = inputs._replace(q=fq, k=fk)
    shapes = _feature_map_shapes(inputs.sequences, k.shape[1], fk.shape[3], v.shape[3])
    before = checks.check_state(initial_state, FeatureMapState, shapes, accumulation_dtype(inputs.q.dtype), q.device)
    options = FeatureMapOptions(is_causal, inputs.q_offset, scale, name, normalize)
    plan = dispatch.plan("feature_map", inputs, form, backend, return_state or bool(before))
    out, state = _feature_map(
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
    """Attention with any similarity.

        out_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)

    Args:
        sim: `sim(q_tile [B, H, tq, D], k_tile [B, H, tk, D]) -> [B, H, tq, tk]`, non-negative: a negative value is an
            ArgumentError on CPU and an asynchronous assertion on CUDA. Its parameters get gradients.
        is_causal: query i sees keys j <= i.

    A row whose similarities are all 0 gives 0. `sim` also sees pairs that is_causal hides: an overflow there makes
    gradients NaN. Complexity: O(T Tk) calls of sim's cost, memory O(T (D + M)) and one tile: tiles are recomputed in
    the backward pass. Can be differentiated any number of times; compiled once for each length. Source: Tsai et al.
    2019, "Transformer dissection"; Katharopoulos et al. 2020.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
        >>> out = kernel_attention(q, k, v, sim=lambda q, k: (q @ k.mT).exp())
        >>> torch.allclose(out, softmax_attention(q, k, v, scale=1.0), atol=1e-5)
        True
    """
    inputs = checks.check_inputs(q, k, v, is_causal=is_causal)
    if not callable(sim):
        raise ArgumentError(f"sim must be callable, sim(q_tile, k_tile) -> scores; given: {sim!r}")
    return _general.kernel_attention(inputs.q, inputs.k, inputs.v, sim, is_causal)


def argmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Look up the value of the best key.

        out_i = v_j,    j = argmax_j q_i.k_j    (the first of equals)

    The limit of softmax attention at falling temperature. Its gradient to q and k is zero wherever it exists, so
    queries and keys cannot learn; values can. NaN scores never win. Complexity: time O(T Tk D), memory O(T M) and one
    tile; compiled once for each length.

    Example:
        >>> k = torch.tensor([[1.0, 2, 0], [0, 3, 4], [5, 0, 0], [0, 0, 1]]).view(1, 1, 4, 3)
        >>> v = torch.tensor([[2.0, 0, 1], [1, 4, 3], [0, -1, 4], [1, 0, -1]]).view(1, 1, 4, 3)
        >>> argmax_attention(torch.tensor([1.0, 1, 2]).view(1, 1, 1, 3), k, v).flatten().tolist()
        [1.0, 4.0, 3.0]
    """
    inputs = checks.check_inputs(q, k, v)
    return _general.argmax_attention(inputs.q, inputs.k, inputs.v)


def attention(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "softmax", **options: Any) -> Any:
    """Any attention of this library by name.

    Args:
        kernel: "softmax", "quadratic", "taylor" (the quadratic kernel with coefficients (1, 1, 0.5) and scale
            1/sqrt(D)), or the name of a feature map: "elu+1", "dpfp" and the others of `linattn.feature_maps`.
        options: those of `softmax_attention`, `quadratic_attention` or `linear_attention`, with their defaults.

    Example:
        >>> q = k = v = torch.randn(1, 2, 16, 8)
        >>> torch.equal(attention(q, k, v, kernel="quadratic"), quadratic_attention(q, k, v))
        True
    """
    function, _, defaults = _resolve(kernel, q, options)
    return function(q, k, v, **{**defaults, **options})


def explain(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "quadratic", **options: Any) -> dispatch.Explanation:
    """What `attention(q, k, v, kernel=kernel, **options)` would run, why, what was refused, and what it should cost.

    Raises what the call would raise. The predicted cost counts a causal call as if the last query were aligned with the
    last key, and packed sequences as if they were equally long.

    Example:
        >>> q = k = v = torch.empty(1, 4, 16384, 64)
        >>> explain(q, k, v, kernel="quadratic", is_causal=True).form
        'chunked'
    """
    function, op, defaults = _resolve(kernel, q, options)
    options = {**defaults, **options}
    checks.check_dtypes(q, k, v)
    if isinstance(options.get("cu_seqlens"), Tensor):
        sequence_bounds(options["cu_seqlens"], q.shape[2])
    asked: Form = options.get("form", "direct" if op == "softmax" else "auto")
    # Run without data: all checks and decisions, no arithmetic.
    with torch.no_grad(), dispatch.noting(q.device.type) as last_choice:
        function(*map(_without_data, (q, k, v)), **{name: _without_data(value) for name, value in options.items()})
        inputs, backend, form, with_state = last_choice()
        refused = dispatch.refusals(op, inputs, asked, with_state)
        pays = dispatch.chunked_from(op, backend, inputs, with_state)
        source = dispatch.source_of_length(op, backend, inputs)
    length = dispatch.effective_length(inputs)
    if op == "softmax":
        reason = "softmax has no state to go through"
    elif asked != "auto":
        reason = f"form={asked!r} was asked for"
    else:
        reason = f"chunked pays from N = {pays:.0f} on ({source}); here N = {length:.0f}"
    packed = inputs.sequences // q.shape[0]
    T, Tk = q.shape[2] // packed, k.shape[2] // packed
    predicted = cost.attention_cost(
        op,
        form,
        B=inputs.sequences,
        H=q.shape[1],
        N=T,
        D=q.shape[3],
        M=v.shape[3],
        keys=max(T, Tk) if inputs.is_causal else Tk,
        is_causal=inputs.is_causal,
        itemsize=q.itemsize,
    )
    runs = dispatch.describe(op, backend, q, k, v, inputs.is_causal, form)
    return dispatch.Explanation(kernel, op, backend, form, reason, runs, refused, predicted)


def _without_data(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, QuadraticState | FeatureMapState):
        return type(value)(*(_without_data(x) for x in value))
    return value


def _resolve(kernel: str, q: Tensor, options: dict[str, Any]) -> tuple[Callable[..., Any], cost.Kernel, dict[str, Any]]:
    """The function behind a kernel's name, its operation and its own defaults; raises on an option that it does not
    have.
    """
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise ShapeError(
            f"q must be [B, H, T, D]; given: {tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__}"
        )
    entry: tuple[Callable[..., Any], cost.Kernel, dict[str, Any]]
    if kernel == "softmax":
        entry = (softmax_attention, "softmax", {})
    elif kernel == "quadratic":
        entry = (quadratic_attention, "quadratic", {})
    elif kernel == "taylor":
        entry = (quadratic_attention, "quadratic", {"coefficients": TAYLOR, "scale": 1 / math.sqrt(q.shape[3])})
    elif kernel in NAMES:
        entry = (linear_attention, "feature_map", {"feature_map": kernel})
    else:
        raise unknown_name("kernel", kernel, ("softmax", "quadratic", "taylor", *NAMES))
    keywords = [name for name, p in inspect.signature(entry[0]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    accepted = [name for name in keywords if name != "feature_map"]  # the kernel's name has said that
    for name in options:
        if name not in accepted:
            raise unknown_name(f"option of kernel {kernel!r}", name, accepted)
    return entry


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
    """How ill-conditioned each row of `quadratic_attention` is, for debugging: `[B, H, T]`.

        kappa_i = sum_j p(|s|_ij) / sum_j p(s_ij),    |s|_ij = |scale| |q_i|.|k_j|

    with |c0|, |c1|, |c2| in the numerator.

    The relative error of row i is about kappa_i times the rounding unit. kappa is near 1 for positive scores and grows
    without bound as the scores of a row approach -1, where (1 + s)^2 vanishes. Infinite for a row whose sum
    vanishes or that sees no key. Not differentiable. Complexity: time O(T Tk D), memory O(T).

    Example:
        >>> q = torch.ones(1, 1, 1, 2)
        >>> quadratic_condition(q, -0.45 * q).item() > 100    # s = -0.9
        True
    """
    inputs = checks.check_inputs(
        q, k, k, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    c = checks.checked_coefficients(coefficients, normalize=True)
    scale = checks.checked_scale(scale)
    actual = QuadraticOptions(is_causal, inputs.q_offset, scale, *c, normalize=False)
    bound = actual._replace(scale=abs(scale), c0=abs(c[0]), c1=abs(c[1]), c2=abs(c[2]))
    with torch.no_grad():
        sums = _quadratic_row_sums(inputs.q, inputs.k, key_mask, cu_seqlens, actual)
        bounds = _quadratic_row_sums(inputs.q.abs(), inputs.k.abs(), key_mask, cu_seqlens, bound)
    return (bounds / sums).masked_fill(sums <= 0, math.inf)
