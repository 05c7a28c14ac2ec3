"""The truth of every operation in float64, from its definition.

`out_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)`: the whole N x N matrix is built, in O(N^2 (D + M)) time and
O(N^2) memory, and no code is shared with the operations that are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

Similarity = Callable[[Tensor, Tensor], Tensor]
Past = tuple[Tensor, Tensor]


class SeenKeys(TypedDict, total=False):
    """The keys that a query sees; all of them by default.

    Attributes:
        is_causal: query i sees keys j <= i + q_offset.
        q_offset: 0 by default.
        key_mask: bool [B,Tk], True for keys that count.
        cu_seqlens: bounds of packed sequences, each of which sees itself alone.
        past: keys [B,Hkv,P,D] and values [B,Hkv,P,M] that every query sees, one batch element for each packed sequence.
    """

    is_causal: bool
    q_offset: int | None
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    past: Past | None


def visible_keys(
    queries: int,
    keys: int,
    *,
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mark the keys each query sees: bool [B or 1, 1, Tq, Tk]. Causal query i sees keys j <= i + q_offset."""
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
    """Compute `sum_j sim(q_i, k_j) v_j`, divided by `sum_j sim(q_i, k_j)` if `normalize`, in float64: [B,H,Tq,M].

    Where the sum of similarities is not positive the result is 0 with zero gradient.

    Args:
        q: [B,H,Tq,D].
        k: [B,Hkv,Tk,D]; fewer key heads than query heads are repeated.
        v: [B,Hkv,Tk,M].
        similarity: `similarity(q [..,Tq,D], k [..,Tk,D]) -> [..,Tq,Tk]`.
        in_logarithms: `similarity` returns log sim; the largest visible one of each query is subtracted before
            exponentiating.
        normalize: divide by the sum of similarities.
        is_causal: see `SeenKeys`, as for the other arguments.
        q_offset: see `SeenKeys`.
        key_mask: see `SeenKeys`.
        cu_seqlens: see `SeenKeys`.
        past: see `SeenKeys`.
    """
    q, k, v = q.double(), k.double(), v.double()
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = []
        for s, (a, b) in enumerate(pairwise(bounds)):
            pieces.append(
                truth_attention(
                    q[:, :, a:b],
                    k[:, :, a:b],
                    v[:, :, a:b],
                    similarity,
                    in_logarithms=in_logarithms,
                    normalize=normalize,
                    is_causal=is_causal,
                    q_offset=q_offset,
                    key_mask=None if key_mask is None else key_mask[:, a:b],
                    past=None if past is None else (past[0][s : s + 1], past[1][s : s + 1]),
                )
            )
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
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **seen_keys: Unpack[SeenKeys]
) -> Tensor:
    """Compute `softmax(scale q k^T) v` in float64. A query without keys gives 0.

    Args:
        q: [B,H,Tq,D].
        k: [B,Hkv,Tk,D].
        v: [B,Hkv,Tk,M].
        scale: `1/sqrt(D)` when not given.
        **seen_keys: see `SeenKeys`.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return truth_attention(q, k, v, lambda q, k: factor * (q @ k.mT), in_logarithms=True, **seen_keys)


def truth_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    coefficients: tuple[float, float, float] = (1, 2, 1),
    normalize: bool = True,
    **seen_keys: Unpack[SeenKeys],
) -> Tensor:
    """Compute attention in float64 with `sim = c0 + c1 s + c2 s^2`, `s = scale q.k`.

    Args:
        q: [B,H,Tq,D].
        k: [B,Hkv,Tk,D].
        v: [B,Hkv,Tk,M].
        scale: of the scores.
        coefficients: c0, c1 and c2.
        normalize: divide by the sum of similarities.
        **seen_keys: see `SeenKeys`.
    """
    c0, c1, c2 = coefficients

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        s = scale * (q @ k.mT)
        return c0 + c1 * s + c2 * s * s

    return truth_attention(q, k, v, similarity, normalize=normalize, **seen_keys)


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
    **seen_keys: Unpack[SeenKeys],
) -> Tensor:
    """Compute attention in float64 with `sim = scale phi(q).phi(k)`.

    Args:
        q: [B,H,Tq,D].
        k: [B,Hkv,Tk,D].
        v: [B,Hkv,Tk,M].
        feature_map: phi, or a name in `TRUE_FEATURE_MAPS`.
        scale: of the similarities.
        normalize: divide by the sum of similarities.
        **seen_keys: see `SeenKeys`.
    """
    phi = TRUE_FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    return truth_attention(q, k, v, lambda q, k: scale * (phi(q) @ phi(k).mT), normalize=normalize, **seen_keys)


def truth_argmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the value whose key has the largest score, in float64."""
    best = (q.double() @ k.double().mT).argmax(dim=-1)
    return torch.take_along_dim(v.double(), best[..., None], dim=2)


def _sequences(k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """List keys and values [Hkv,n,*] of each batch element or packed sequence, masked keys dropped."""
    if cu_seqlens is None:
        spans = [(b, 0, k.shape[2]) for b in range(k.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        spans = [(0, a, b) for a, b in pairwise(bounds)]
    found = []
    for batch, a, b in spans:
        keep = slice(None) if key_mask is None else key_mask[batch, a:b]
        found.append((k[batch, :, a:b].double()[:, keep], v[batch, :, a:b].double()[:, keep]))
    return found


def truth_quadratic_state(
    k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Compute (n, k_sum, kk, v_sum, kv, kkv) in float64, in the canonical layout: kkv over a >= b at a(a+1)/2 + b."""
    states = []
    for keys, values in _sequences(k, v, key_mask, cu_seqlens):
        outer = torch.einsum("hna,hnb,hnm->habm", keys, keys, values)
        products = torch.stack([outer[:, a, b] for a in range(keys.shape[-1]) for b in range(a + 1)], dim=1)
        states.append(
            (
                torch.tensor(keys.shape[1]),
                keys.sum(dim=1),
                torch.einsum("hna,hnb->hab", keys, keys),
                values.sum(dim=1),
                torch.einsum("hna,hnm->ham", keys, values),
                products,
            )
        )
    return tuple(torch.stack(column) for column in zip(*states, strict=True))


def truth_feature_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | Callable[[Tensor], Tensor] = "elu+1",
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute (n, f_sum, fv) in float64."""
    phi = TRUE_FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map
    states = []
    for keys, values in _sequences(k, v, key_mask, cu_seqlens):
        features = phi(keys)
        fv = torch.einsum("hnc,hnm->hcm", features, values)
        states.append((torch.tensor(keys.shape[1]), features.sum(dim=1), fv))
    return tuple(torch.stack(column) for column in zip(*states, strict=True))
