"""Attention layers and the transformer made of them: x [B, T, dim] -> [B, T, dim], any kernel of this library.

A transformer here is a stack of L layers, T(x) = T_L(... T_1(x)), in one of two kinds:

    course     T_l(x) = f_l(A_l(x) + x)                            the plain definition
    prenorm    y = x + A_l(norm(x)),  T_l(x) = y + f_l(norm(y))    what is trained in practice; a last norm follows T_L

with A_l an attention layer and f_l a feed-forward net of two linear layers, applied at every position alike.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn import feature_maps, functional
from linattn.decode import POLYNOMIAL, DecodeCache, ModelCache
from linattn.errors import ArgumentError, ShapeError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from linattn.feature_maps import FeatureMap

LayerKind = Literal["prenorm", "course"]

FORMS = ("direct", "chunked", "recurrent")
KERNELS = ("softmax", *POLYNOMIAL, *feature_maps.NAMES)


def rotate(x: Tensor, base: float = 10_000.0, positions: Tensor | None = None) -> Tensor:
    """Rotary position embedding: turn pairs of entries by an angle that grows with the position.

        (x_i, x_{i+D/2}) at position t  ->  turned by t * base^(-2 i / D)

    Dot products of rotated queries and keys depend on positions only by their difference, so any length can be given,
    and a key once rotated never changes: sums over keys (the state of a linear form) stay valid as the text goes on.

    Args:
        x: [B, T, H, D] with D even, any floating dtype; angles are computed in float32.
        base: the slowest pair turns once in about 2 pi * base positions.
        positions: [T], or [B, T] where sequences differ; 0 ... T - 1 when not given.

    Returns:
        The same shape and dtype. Complexity O(B T H D).

    Source: Su et al. 2021, "RoFormer: Enhanced transformer with rotary position embedding".

    Example:
        >>> x = torch.ones(1, 3, 1, 2)
        >>> rotate(x)[0, 0, 0]
        tensor([1., 1.])
    """
    T, D = x.shape[1], x.shape[3]
    positions = torch.arange(T, device=x.device) if positions is None else positions
    frequency = base ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
    angle = positions.to(torch.float32)[..., None, None] * frequency  # [T, 1, D / 2] or [B, T, 1, D / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def positions_of(T: int, key_mask: Tensor | None, cache: DecodeCache | None) -> Tensor | None:
    """Where T new tokens stand in their sequences, for `rotate`: padding takes no place, and cached tokens come before.

    Returns:
        int64 [B, T]; None for 0 ... T - 1.
    """
    seen = None if cache is None or cache.seen is None else cache.seen[:, None]
    if key_mask is not None:
        places = (key_mask.cumsum(1) - 1).clamp(min=0)
        return places if seen is None else places + seen
    return None if seen is None else seen + torch.arange(T, device=seen.device)


class Attention(nn.Module):
    """Multi-head attention with any kernel: out = W_o concat_h attention(W_q x, W_k x, W_v x).

    Queries, keys and values come from one fused projection and enter the kernel as strided views of it; only `qk_norm`
    and `rotary`, where asked for, make new queries and keys.

    Args:
        dim: width of the input and the output.
        heads: number of query heads; `head_dim = dim / heads` unless given.
        kernel: "softmax", "quadratic", "taylor", the name of a feature map, or a feature map itself: any callable [...,
            D] -> [..., C]. A module (one that learns) becomes part of this one, as do "favor+" and "hedgehog".
        is_causal: position i sees positions <= i only.
        kv_heads: number of key and value heads, a divisor of `heads` (grouped-query attention); `heads` when not given.
        head_dim: D = M, the size of a head.
        scale: factor on q.k, 1 / sqrt(D) when not given.
        form: "direct", "chunked" or "recurrent" for every kernel but softmax. It is pinned here, never "auto", because
            the choice of "auto" depends on the length, and with it the rounding. When not given: "chunked" for feature
            maps, whose state is small, and "direct" for "quadratic" and "taylor"; choose "chunked" there when sequences
            are longer than about D^2.
        qk_norm: bring queries and keys to root mean square 1 per head, times a learned gain. Keeps |s| = |q.k| /
            sqrt(D) below about sqrt(D), which bounds the condition of the quadratic kernel.
        rotary: base of the rotary position embedding (see `rotate`), usually 10000.0; None for no positions.
        bias: biases in both projections.
        **options: passed on to `linattn.functional.attention`, such as `normalize`, `coefficients`, `backend`.

    Raises:
        ArgumentError: an unknown kernel or form, "identity" without normalize=False, "recurrent" without `is_causal`,
            a form for softmax, sizes that do not divide, an odd `head_dim` with `rotary`.
        ShapeError: in the call, an input that is not [B, T, dim].

    Complexity of a call: the projections take O(B T dim^2), the attention what `linattn.cost` says for its kernel and
    form.

    Example:
        >>> layer = Attention(64, 4, kernel="quadratic", is_causal=True)
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kernel: FeatureMap = "softmax",
        is_causal: bool = False,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        form: str | None = None,
        qk_norm: bool = False,
        rotary: float | None = None,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ArgumentError(
                f"heads={heads} and kv_heads={kv_heads} were given; accepted: positive, heads a multiple of kv_heads"
            )
        if head_dim is None:
            if dim < heads or dim % heads:
                raise ArgumentError(
                    f"dim={dim} and heads={heads} were given; accepted: dim a multiple of heads, or a head_dim"
                )
            head_dim = dim // heads
        if rotary is not None and head_dim % 2:
            raise ArgumentError(
                f"rotary positions turn pairs of entries, so they need an even head_dim; got {head_dim}"
            )
        if isinstance(kernel, str) and kernel not in KERNELS:
            raise unknown_name("kernel", kernel, KERNELS)
        if kernel in feature_maps.NAMES and kernel not in feature_maps.POSITIVE and options.get("normalize", True):
            named = [name for name in KERNELS if name not in feature_maps.NAMES or name in feature_maps.POSITIVE]
            raise ArgumentError(
                f"kernel={kernel!r} was given, whose similarities may be negative and need normalize=False; "
                f"accepted with normalize=True: {', '.join(map(repr, named))}"
            )
        if form is not None and form not in FORMS:
            raise unknown_name("form", form, FORMS)
        if form == "recurrent" and not is_causal and kernel != "softmax":
            raise ArgumentError(f"form={form!r} was given without is_causal=True; accepted: 'direct' or 'chunked'")
        if kernel == "softmax":
            if form is not None:
                raise ArgumentError(
                    f"form={form!r} was given for kernel 'softmax', which has one form only; leave form out"
                )
        else:
            options["form"] = form or ("direct" if kernel in POLYNOMIAL else "chunked")

        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        entry = feature_maps.CATALOGUE.get(kernel) if isinstance(kernel, str) else None
        self.kernel = entry.make(head_dim) if entry is not None and entry.function is None else kernel
        self.is_causal = is_causal
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.rotary = rotary
        self.options = options
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)

    def decode_cache(self, capacity: int | None = None) -> DecodeCache:
        """An empty cache for this layer; see `linattn.decode`.

        Raises:
            ArgumentError: the layer is not causal.
        """
        if not self.is_causal:
            raise ArgumentError("a decoding cache was asked of a layer with is_causal=False; accepted: is_causal=True")
        options = {name: value for name, value in self.options.items() if name != "form"}
        return DecodeCache.of(
            self.kernel, capacity=capacity, scale=self.scale, enable_gqa=self.kv_heads != self.heads, **options
        )

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, cache: DecodeCache | None = None) -> Tensor:
        """Attend, [B, T, dim] -> [B, T, dim].

        Args:
            x: the input [B, T, dim].
            key_mask: bool [B, T], True where a position is real, not padding, which takes no rotary position either.
            cache: what stands in for the tokens before these; these are added to it.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"the input has shape {tuple(x.shape)}; accepted: [B, T, {self.dim}]")
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, D]
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            positions = positions_of(x.shape[1], key_mask, cache)
            q, k = rotate(q, self.rotary, positions), rotate(k, self.rotary, positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = self._attend(q, k, v, key_mask) if cache is None else cache(q, k, v, key_mask=key_mask)
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        options = {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "key_mask": key_mask,
            "enable_gqa": self.kv_heads != self.heads,
            **self.options,
        }
        out: Tensor
        if isinstance(self.kernel, str):
            out = functional.attention(q, k, v, kernel=self.kernel, **options)
        else:
            out = functional.linear_attention(q, k, v, feature_map=self.kernel, **options)
        return out

    def extra_repr(self) -> str:
        """Say in `repr` which kernel attends, and how."""
        kernel = self.kernel if isinstance(self.kernel, str) else type(self.kernel).__name__
        form = self.options.get("form")
        return f"{kernel}, heads={self.heads}, kv_heads={self.kv_heads}, is_causal={self.is_causal}" + (
            f", form={form}" if form else ""
        )


class FeedForward(nn.Module):
    """f(x) = W_2 gelu(W_1 x + b_1) + b_2: [..., dim] -> [..., dim], hidden width 4 dim unless given."""

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.first = nn.Linear(dim, hidden)
        self.second = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., dim]` to `[..., dim]`."""
        out: Tensor = self.second(F.gelu(self.first(x)))
        return out


class CourseLayer(nn.Module):
    """The transformer layer as it is usually written down: T_l(x) = f_l(A_l(x) + x), [B, T, dim] -> [B, T, dim].

    Nothing normalises it and f_l has no residual path around it, so it suits a few layers; `PreNormLayer` goes deep.

    Args:
        dim, heads: see `Attention`.
        hidden: width inside f_l, 4 dim when not given.
        dropout: probability of dropping entries of A_l(x) and of f_l's result in training.
        **attention: the other arguments of `Attention`.

    Example:
        >>> CourseLayer(32, 2, kernel="quadratic")(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, hidden: int | None = None, dropout: float = 0.0, **attention: Any
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, **attention)
        self.feed_forward = FeedForward(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, cache: DecodeCache | None = None) -> Tensor:
        """Map `[B, T, dim]` to `[B, T, dim]`; `key_mask` and `cache` as for `Attention`."""
        mixed = self.dropout(self.attention(x, key_mask=key_mask, cache=cache)) + x
        out: Tensor = self.dropout(self.feed_forward(mixed))
        return out


class PreNormLayer(nn.Module):
    """The layer trained in practice: y = x + A(norm(x)), out = y + f(norm(y)), [B, T, dim] -> [B, T, dim].

    norm(x) = x / rms(x) times a learned gain. Arguments as for `CourseLayer`.

    Sources: Xiong et al. 2020, "On layer normalization in the transformer architecture"; Zhang and Sennrich 2019, "Root
    mean square layer normalization".

    Example:
        >>> PreNormLayer(32, 2, kernel="elu+1", is_causal=True)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self, dim: int, heads: int, *, hidden: int | None = None, dropout: float = 0.0, **attention: Any
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, heads, **attention)
        self.feed_forward_norm = nn.RMSNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, cache: DecodeCache | None = None) -> Tensor:
        """Map `[B, T, dim]` to `[B, T, dim]`; `key_mask` and `cache` as for `Attention`."""
        mixed = x + self.dropout(self.attention(self.attention_norm(x), key_mask=key_mask, cache=cache))
        out: Tensor = mixed + self.dropout(self.feed_forward(self.feed_forward_norm(mixed)))
        return out

    @torch.no_grad()
    def scale_branches(self, factor: float) -> None:
        """Multiply what both branches add to the residual path, through the weights of their last projections."""
        self.attention.out.weight.mul_(factor)
        self.feed_forward.second.weight.mul_(factor)


LAYERS: dict[str, type[CourseLayer] | type[PreNormLayer]] = {"prenorm": PreNormLayer, "course": CourseLayer}


class Transformer(nn.Module):
    """L layers one after another, [B, T, dim] -> [B, T, dim].

    Args:
        layers: L, the number of layers, at least 1.
        dim, heads: see `Attention`.
        layer: "prenorm" (`PreNormLayer`, followed by one last norm) or "course" (`CourseLayer`).
        hidden, dropout: see `CourseLayer`.
        kernel: see `Attention`; a tuple or list gives layer l its entry l modulo its length, as in ("quadratic",
            "quadratic", "quadratic", "softmax"): one softmax layer in four.
        form: see `Attention`; among several kernels it is that of all but softmax.
        **attention: the other arguments of `Attention`, the same for every layer.

    Raises:
        ArgumentError: an unknown kind of layer, fewer than one layer, no kernel, and what `Attention` raises.

    Example:
        >>> model = Transformer(2, 32, 2, kernel="quadratic", is_causal=True, rotary=10_000.0)
        >>> model(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        layers: int,
        dim: int,
        heads: int,
        *,
        layer: LayerKind = "prenorm",
        hidden: int | None = None,
        dropout: float = 0.0,
        kernel: FeatureMap | Sequence[FeatureMap] = "softmax",
        form: str | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ArgumentError(f"layers={layers} was given; accepted: at least 1")
        kernels = kernel if isinstance(kernel, tuple | list) else (kernel,)
        if not kernels:
            raise ArgumentError("no kernel was given; accepted: one, or a tuple with one for each of the first layers")
        if layer not in LAYERS:
            raise unknown_name("layer", layer, LAYERS)
        make = LAYERS[layer]
        self.layers = nn.ModuleList()
        for own, _ in zip(itertools.cycle(kernels), range(layers), strict=False):
            own_form = None if own == "softmax" and len(kernels) > 1 else form
            options = {"kernel": own, "form": own_form, **attention}
            self.layers.append(make(dim, heads, hidden=hidden, dropout=dropout, **options))
        self.norm = nn.RMSNorm(dim) if layer == "prenorm" else nn.Identity()
        for each in self.layers:
            if isinstance(each, PreNormLayer):
                # 2 L branches add up: this keeps the variance at the start independent of L (Radford et al. 2019).
                each.scale_branches(1 / math.sqrt(2 * layers))

    def decode_cache(self, capacity: int | None = None) -> ModelCache:
        """Empty caches for all layers; see `linattn.decode`."""
        layers = cast("Iterable[CourseLayer | PreNormLayer]", self.layers)
        return ModelCache(layer.attention.decode_cache(capacity) for layer in layers)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, cache: ModelCache | None = None) -> Tensor:
        """`key_mask` bool [B, T], True where a position is real and False where it is padding; `cache` stands in for
        the positions before these, which are added to it.
        """
        caches = itertools.repeat(None) if cache is None else cache.layers
        for layer, held in zip(self.layers, caches, strict=False):
            x = layer(x, key_mask=key_mask, cache=held)
        out: Tensor = self.norm(x)
        return out
