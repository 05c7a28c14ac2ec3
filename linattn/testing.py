"""What tests and benchmarks share: input factories, the truth of every operation in float64, and the error budgets.

The truths are written from the definition `out_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)`: they build the whole
N x N matrix, cost O(N^2 (D + M)) time and O(N^2) memory, and share no code with the operations they judge.

    >>> import torch
    >>> from linattn.testing import make_inputs, relative_error, truth_quadratic
    >>> q, k, v = make_inputs(keys=5, head_size=4)
    >>> relative_error(truth_quadratic(q, k, v, is_causal=True)[:, :, 0], v[:, :, 0]) < 1e-12
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "transposed", "fused", "strided"]
Similarity = Callable[[Tensor, Tensor], Tensor]
Past = tuple[Tensor, Tensor]

LAYOUTS: tuple[Layout, ...] = ("contiguous", "transposed", "fused", "strided")


# ---- inputs ----------------------------------------------------------------------------------------------------------


def make_inputs(
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int | None = None,
    keys: int = 33,
    head_size: int = 8,
    value_size: int | None = None,
    score_std: float = 0.25,
    positive: bool = False,
    layout: Layout = "contiguous",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q [B,H,Tq,D], k [B,Hkv,Tk,D], v [B,Hkv,Tk,M].

    Gaussian values, scaled so that the scores `q.k` have standard deviation `score_std` whatever D is. The default of
    0.25 keeps the quadratic kernel far from its zero at -1, hence well conditioned. `positive` takes absolute values of
    q and k, which bounds the scores away from 0.

    `layout` says how they lie in memory: "contiguous"; "transposed", stored as [B,T,H,D]; "fused", three slices of one
    [B,T,features] projection (needs as many queries as keys); "strided", every second element of a wider tensor, so
    that the last stride is 2. Raises ValueError for a fused layout of unequal lengths.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    queries = keys if queries is None else queries
    value_size = head_size if value_size is None else value_size
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, queries, head_size), (kv_heads, keys, head_size), (kv_heads, keys, value_size))
    q, k, v = (torch.randn(batch, *shape, dtype=torch.float64, generator=generator) for shape in shapes)
    if positive:
        q, k = q.abs(), k.abs()
    factor = score_std**0.5 / head_size**0.25
    tensors = [t.to(device=device, dtype=dtype) for t in (q * factor, k * factor, v)]
    if layout == "fused":
        return _as_slices_of_one(tensors)
    q, k, v = (_laid_out(t, layout) for t in tensors)
    return q, k, v


def _laid_out(t: Tensor, layout: Layout) -> Tensor:
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]
    return t.contiguous()


def _as_slices_of_one(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if len({t.shape[2] for t in tensors}) != 1:
        raise ValueError(f"a fused layout needs one length, given {[t.shape[2] for t in tensors]}")
    rows = [t.transpose(1, 2).flatten(2) for t in tensors]
    parts = torch.split(torch.cat(rows, dim=-1), [r.shape[-1] for r in rows], dim=-1)
    q, k, v = (part.view(t.transpose(1, 2).shape).transpose(1, 2) for part, t in zip(parts, tensors, strict=True))
    return q, k, v


def make_key_mask(batch: int, keys: int, *, keep: float = 0.7, seed: int = 0) -> Tensor:
    """Draw a boolean key mask [B,Tk], True for real keys, with at least one real key a row."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < keep
    mask[:, keys // 2] = True
    return mask


# ---- truth -----------------------------------------------------------------------------------------------------------


def visible_keys(
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which keys each query sees: bool [B or 1, 1, Tq, Tk]. Causal query i sees keys j <= i + q_offset."""
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if is_causal:
        i = torch.arange(queries, device=device)[:, None]
        j = torch.arange(keys, device=device)[None, :]
        seen = seen & (j <= i + (q_offset or 0))
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    return seen


def truth_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    similarity: Similarity,
    *,
    in_logarithms: bool = False,
    normalize: bool = True,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past: Past | None = None,
) -> Tensor:
    """`sum_j sim(q_i, k_j) v_j`, divided by `sum_j sim(q_i, k_j)` if `normalize`, in float64: [B,H,Tq,M].

    `similarity(q [..,Tq,D], k [..,Tk,D]) -> [..,Tq,Tk]`. Fewer key heads than query heads are repeated. `past` holds
    keys [B,Hkv,P,D] and values [B,Hkv,P,M] that every query sees, one batch element for each packed sequence. Where the
    sum of similarities is not positive the row is 0 with zero gradient. `in_logarithms` says that `similarity` returns
    log sim; the largest visible one of each row is subtracted before exponentiating.
    """
    q, k, v = q.double(), k.double(), v.double()
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = []
        for s, (a, b) in enumerate(pairwise(bounds)):
            pieces.append(
                truth_attention(
                    q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], similarity, in_logarithms=in_logarithms,
                    normalize=normalize, is_causal=is_causal, q_offset=q_offset,
                    key_mask=None if key_mask is None else key_mask[:, a:b],
                    past=None if past is None else (past[0][s : s + 1], past[1][s : s + 1]),
                )
            )  # fmt: skip
        return torch.cat(pieces, dim=2)
    seen = visible_keys(
        q.shape[2], k.shape[2], is_causal=is_causal, q_offset=q_offset, key_mask=key_mask, device=q.device
    )
    if past is not None:
        k, v = torch.cat([past[0].double(), k], dim=2), torch.cat([past[1].double(), v], dim=2)
        seen = torch.cat([seen.new_ones(*seen.shape[:-1], past[0].shape[2]), seen], dim=-1)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    weights = similarity(q, k)
    if in_logarithms and weights.numel():
        peak = torch.where(seen, weights.detach(), -torch.inf).amax(dim=-1, keepdim=True)
        weights = torch.exp(torch.where(seen, weights - peak, 0.0))
    weights = torch.where(seen, weights, 0.0)
    out = weights @ v
    if not normalize:
        return out
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, out / torch.where(total > 0, total, 1.0), 0.0)


def truth_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q k^T) v` in float64; `scale` None is `1/sqrt(D)`. A query without keys gives 0."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return truth_attention(
        q, k, v, lambda q, k: factor * (q @ k.mT), in_logarithms=True, is_causal=is_causal, q_offset=q_offset,
        key_mask=key_mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def truth_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    coefficients: tuple[float, float, float] = (1, 2, 1),
    normalize: bool = True,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past: Past | None = None,
) -> Tensor:
    """Attention in float64 with `sim = c0 + c1 s + c2 s^2`, `s = scale q.k`."""
    c0, c1, c2 = coefficients

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        s = scale * (q @ k.mT)
        return c0 + c1 * s + c2 * s * s

    return truth_attention(
        q, k, v, similarity, normalize=normalize, is_causal=is_causal, q_offset=q_offset, key_mask=key_mask,
        cu_seqlens=cu_seqlens, past=past,
    )  # fmt: skip


TRUE_FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "exp": torch.exp,
    "identity": lambda x: x,
}


def truth_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu+1",
    scale: float = 1.0,
    normalize: bool = True,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past: Past | None = None,
) -> Tensor:
    """Attention in float64 with `sim = scale phi(q).phi(k)`."""
    phi = TRUE_FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    return truth_attention(
        q, k, v, lambda q, k: scale * (phi(q) @ phi(k).mT), normalize=normalize, is_causal=is_causal,
        q_offset=q_offset, key_mask=key_mask, cu_seqlens=cu_seqlens, past=past,
    )  # fmt: skip


def truth_argmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The value whose key has the largest score, in float64."""
    best = (q.double() @ k.double().mT).argmax(dim=-1)
    return torch.take_along_dim(v.double(), best[..., None], dim=2)


# ---- truth of the states ---------------------------------------------------------------------------------------------


def _sequences(k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [Hkv,n,*] of each batch element or packed sequence, masked keys dropped."""
    if cu_seqlens is None:
        spans = [(b, 0, k.shape[2]) for b in range(k.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(0, a, b) for a, b in pairwise(bounds)]
    pairs = []
    for batch, a, b in spans:
        keep = slice(None) if key_mask is None else key_mask[batch, a:b]
        pairs.append((k[batch, :, a:b].double()[:, keep], v[batch, :, a:b].double()[:, keep]))
    return pairs


def truth_quadratic_state(
    k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(n, k_sum, kk, v_sum, kv, kkv) in float64, in the canonical layout: kkv over pairs a >= b at a(a+1)/2 + b."""
    rows = []
    for keys, values in _sequences(k, v, key_mask, cu_seqlens):
        outer = torch.einsum("hna,hnb,hnm->habm", keys, keys, values)
        pairs = torch.stack([outer[:, a, b] for a in range(keys.shape[-1]) for b in range(a + 1)], dim=1)
        rows.append(
            (
                torch.tensor(keys.shape[1]),
                keys.sum(dim=1),
                torch.einsum("hna,hnb->hab", keys, keys),
                values.sum(dim=1),
                torch.einsum("hna,hnm->ham", keys, values),
                pairs,
            )
        )
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def truth_feature_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu+1",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(n, f_sum, fv) in float64."""
    phi = TRUE_FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    rows = []
    for keys, values in _sequences(k, v, key_mask, cu_seqlens):
        features = phi(keys)
        pairs = torch.einsum("hnc,hnm->hcm", features, values)
        rows.append((torch.tensor(keys.shape[1]), features.sum(dim=1), pairs))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let uninitialised memory hold NaN (integers: their smallest), so that an operation that forgets to write a place
    cannot pass by luck. Memory that compiled code allocates stays as it is."""
    names = {torch: ("empty", "empty_like", "empty_strided"), Tensor: ("new_empty", "new_empty_strided")}
    before = [(owner, name, getattr(owner, name)) for owner, some in names.items() for name in some]
    try:
        for owner, name, allocate in before:
            setattr(owner, name, _poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in before:
            setattr(owner, name, allocate)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return allocate_and_poison


# ---- errors and budgets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """The largest accepted relative error, by norm of a whole tensor, on well-conditioned inputs."""

    forward: float
    gradient: float


BUDGETS: dict[torch.dtype, Budget] = {
    torch.float64: Budget(1e-12, 1e-11),
    torch.float32: Budget(1e-5, 5e-5),
    torch.bfloat16: Budget(3e-3, 1e-2),
    torch.float16: Budget(3e-3, 1e-2),
}


def relative_error(actual: Tensor, truth: Tensor, *, floor: float = 0.0) -> float:
    """`|actual - truth| / max(|truth|, floor)` by Euclidean norm, in float64; NaN where either holds NaN."""
    difference = float(torch.linalg.vector_norm(actual.double() - truth.double()))
    size = max(float(torch.linalg.vector_norm(truth.double())), floor)
    return difference / size if size > 0 else difference


def row_errors(actual: Tensor, truth: Tensor, v: Tensor) -> Tensor:
    """Error of each row against the largest value: `|actual_i - truth_i| / max_j |v_j|`, [B,H,Tq]."""
    errors: Tensor = torch.linalg.vector_norm(actual.double() - truth.double(), dim=-1)
    sizes: Tensor = torch.linalg.vector_norm(v.double(), dim=-1)
    return errors / sizes.max()


def condition_number(
    q: Tensor,
    k: Tensor,
    *,
    scale: float = 1.0,
    coefficients: tuple[float, float, float] = (1, 2, 1),
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`kappa_i = sum_j (|c0| + |c1| t_ij + |c2| t_ij^2) / l_i` with `t = |scale| |q|.|k|`, in float64: [B,H,Tq].

    The error of a row of quadratic attention is about eps * kappa. Infinite where l_i is 0.
    """
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = visible_keys(
        q.shape[2], k.shape[2], is_causal=is_causal, q_offset=q_offset, key_mask=key_mask, device=q.device
    )
    c0, c1, c2 = coefficients
    s, t = scale * (q @ k.mT), abs(scale) * (q.abs() @ k.abs().mT)
    total = torch.where(seen, c0 + c1 * s + c2 * s * s, 0.0).sum(dim=-1)
    return torch.where(seen, abs(c0) + abs(c1) * t + abs(c2) * t * t, 0.0).sum(dim=-1) / total.abs()


def evaluate(
    function: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor],
    *,
    upstream_dtype: torch.dtype | None = None,
    seed: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `function(*tensors)` and pull random upstream gradients back: (floating outputs, gradient of each tensor).

    The tensors become leaves that keep their strides. `upstream_dtype` rounds the upstream gradients, so that a truth
    in float64 is pulled back from the very numbers a low-precision operation was given.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = function(*leaves)
    outputs = [t for t in ([result] if isinstance(result, Tensor) else result) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    upstream = []
    for output in outputs:
        drawn = torch.randn(output.shape, dtype=torch.float64, generator=generator)
        upstream.append(drawn.to(upstream_dtype or output.dtype).to(device=output.device, dtype=output.dtype))
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
    return [output.detach() for output in outputs], filled


def assert_close_to_truth(
    actual: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    floor: float = 0.0,
    what: str = "output",
) -> None:
    """Raise AssertionError unless shapes agree and the relative error is within the budget of `dtype`.

    `dtype` defaults to the dtype of `actual`; `floor` is the norm below which the error is taken as absolute.
    """
    dtype = dtype or actual.dtype
    limit = BUDGETS[dtype].gradient if gradient else BUDGETS[dtype].forward
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    error = relative_error(actual, truth, floor=floor)
    if not error <= limit:
        raise AssertionError(f"{what}: relative error {error:.3e} exceeds {limit:.1e} ({dtype})")


def assert_matches_truth(
    function: Callable[..., Tensor | Sequence[Tensor]],
    truth: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor],
    *,
    names: Sequence[str] = ("q", "k", "v"),
    dtype: torch.dtype | None = None,
) -> None:
    """Compare every output and the gradient of every input with the truth evaluated in float64 on the same numbers.

    A gradient far smaller than the largest (one key: dq = 0) is compared on a hundredth of the largest one's scale.
    """
    dtype = dtype or tensors[0].dtype
    outputs, gradients = evaluate(function, tensors)
    true_outputs, true_gradients = evaluate(truth, [t.double() for t in tensors], upstream_dtype=outputs[0].dtype)
    if len(outputs) != len(true_outputs):
        raise AssertionError(f"{len(outputs)} outputs, expected {len(true_outputs)}")
    for index, (output, expected) in enumerate(zip(outputs, true_outputs, strict=True)):
        assert_close_to_truth(output, expected, dtype=dtype, what=f"output {index}")
    floor = 1e-2 * max(g.norm().item() for g in true_gradients)
    for name, gradient, expected in zip(names, gradients, true_gradients, strict=True):
        assert_close_to_truth(gradient, expected, dtype=dtype, gradient=True, floor=floor, what=f"gradient of {name}")
