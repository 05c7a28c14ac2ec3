"""Input factories: queries, keys, values and masks, drawn from a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

Layout = Literal["contiguous", "transposed", "fused", "strided"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "transposed", "fused", "strided")


def make_inputs(  # noqa: PLR0913  # by keyword only, and each has a default
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
