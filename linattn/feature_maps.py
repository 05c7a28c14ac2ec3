"""Feature maps phi: what `linear_attention` does to queries and keys before the sums, sim(q, k) = phi(q).phi(k).

Each map has a name, which `linear_attention`, `linattn.modules.Attention` and `linattn.lm.model.CausalLM` take; a
function or a module `[..., D] -> [..., C]`, which they take as well; and a row in `CATALOGUE`:

    name                C            never negative   made for
    elu+1               D            yes              short features, elementwise
    relu, relu2, exp    D            yes              the same
    softmax-features    D            yes              features that share a sum of 1
    dpfp                2 D nu       yes              sparse products of features
    quadratic-features  (D+1)(D+2)/2 yes              (1 + q.k)^2, exactly
    taylor-features     (D+1)(D+2)/2 yes              exp(q.k / sqrt D) to second order, exactly that polynomial
    favor+              m = 4 D      yes              exp(q.k / sqrt D), by random features: unbiased
    hedgehog            2 D          yes              softmax attention, learned
    identity            D            no               features that were computed before

"Never negative" is said of phi(q).phi(k) and is what normalisation needs. The elementwise maps run inside the kernels;
the others are computed before them, in PyTorch. `quadratic_attention` computes the kernels of the two polynomial maps
faster, without making features of the queries and keys in memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linattn._dispatch.checks import autocasts
from linattn.errors import ArgumentError, DtypeError, ShapeError, refusal, unknown_name
from linattn.kernels.feature_map.maps import MAPS

FeatureMap = str | Callable[[Tensor], Tensor]


# ---- functions -------------------------------------------------------------------------------------------------------


def elu_plus_one(x: Tensor) -> Tensor:
    """X + 1 for x > 0, else exp(x), elementwise. Source: Katharopoulos et al. 2020, "Transformers are RNNs"."""
    return MAPS["elu+1"].phi(x)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), elementwise; a row may vanish. Source: Kasai et al. 2021, "Finetuning pretrained transformers into
    RNNs".
    """
    return MAPS["relu"].phi(x)


def relu2(x: Tensor) -> Tensor:
    """Map x to max(x, 0)^2, elementwise; a row may vanish. Source of the activation: So et al. 2021, "Primer"."""
    return MAPS["relu2"].phi(x)


def exp(x: Tensor) -> Tensor:
    """Map each entry to its exponential: every feature is positive. Source of such features: Choromanski et al. 2021,
    "Rethinking attention with performers".
    """
    return MAPS["exp"].phi(x)


def softmax_features(x: Tensor) -> Tensor:
    """Softmax over the D entries: positive features that sum to 1.

    Source: Shen et al. 2021, "Efficient attention", which takes it for queries; here for keys too, whose softmax over
    positions would not be causal.
    """
    return x.softmax(-1)


def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection: products of neighbours, sparse, `[..., D] -> [..., 2 D nu]`.

        r = [relu(x), relu(-x)],    phi = [r_i r_(i + j)]  for j = 1 ... nu, indices modulo 2 D

    Source: Schlag et al. 2021, "Linear transformers are secretly fast weight programmers".

    Example:
        >>> dpfp(torch.tensor([1.0, -2.0])).tolist()    # r = [1, 0, 0, 2]
        [2.0, 0.0, 0.0, 0.0]
    """
    r = torch.cat((x.relu(), (-x).relu()), dim=-1)
    return torch.cat([r * r.roll(j, dims=-1) for j in range(1, nu + 1)], dim=-1)


def quadratic_features(x: Tensor, scale: float = 1.0) -> Tensor:
    """The exact map of the quadratic kernel: phi(q).phi(k) = (1 + scale q.k)^2, `[..., D] -> [..., (D+1)(D+2)/2]`.

    phi(x) = [1, sqrt2 x_i, x_i^2, sqrt2 x_i x_j (i < j)]

    Source: Kacham et al. 2023, "PolySketchFormer", for polynomial kernels in attention.

    Example:
        >>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> round((quadratic_features(q) @ quadratic_features(k)).item(), 4)    # (1 + 1)^2
        4.0
    """
    return _polynomial_features(x, 1.0, 2.0 * scale, scale**2)


def taylor_features(x: Tensor, scale: float | None = None) -> Tensor:
    """The exact map of 1 + s + s^2 / 2, s = scale q.k: exp(s) to second order, `[..., D] -> [..., (D+1)(D+2)/2]`.

    `scale` is 1 / sqrt(D) when not given. Never below 1/2.

    Source: Arora et al. 2024, "Simple linear attention language models balance the recall-throughput tradeoff".
    """
    scale = x.shape[-1] ** -0.5 if scale is None else scale
    return _polynomial_features(x, 1.0, scale, 0.5 * scale**2)


def _polynomial_features(x: Tensor, c0: float, c1: float, c2: float) -> Tensor:
    """phi(q).phi(k) = c0 + c1 s + c2 s^2, s = q.k, without duplicates; rounded to the dtype of x once."""
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1, device=x.device)
    constant = torch.full_like(x[..., :1], math.sqrt(c0))
    squares, products = math.sqrt(c2) * x.square(), math.sqrt(2 * c2) * x[..., i] * x[..., j]
    return torch.cat((constant, math.sqrt(c1) * x, squares, products), dim=-1).to(dtype)


# ---- modules ---------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A map without parameters as a module.

    Attributes:
        name: in `CATALOGUE`. size: its number of features C. positive: phi(q).phi(k) is never negative.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str, size: int, positive: bool) -> None:
        super().__init__()
        self.function, self.name, self.size, self.positive = function, name, size, positive

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to features `[..., C]`."""
        return self.function(x)

    def extra_repr(self) -> str:
        """Say in `repr` how the map is set up."""
        return f"{self.name!r}, size={self.size}"


class Favor(nn.Module):
    """FAVOR+: positive random features whose product is exp(q.k / sqrt D) on average, `[..., D] -> [..., m]`.

        phi(x) = exp(w_r.x' - |x'|^2 / 2) / sqrt m,  r = 1 ... m,    x' = D^(-1/4) x,  w_r ~ N(0, I)

    Orthogonal: the w_r are perpendicular to each other within each block of D, their lengths those of Gaussian vectors,
    which lowers the variance and leaves the mean. Nothing is subtracted from the exponents, which would tie features to
    the keys seen so far and break states; computed in float32 they stay finite, since phi <= exp(|w|^2 / 2).

    Args:
        head_dim: D.
        features: m, 4 D when not given.
        orthogonal: see above.
        generator: of the w_r; a fresh one of seed 0 when not given.

    Attributes:
        size: m. positive: True. projection: the w_r, a buffer [m, D], saved with the model and never trained.

    Source: Choromanski et al. 2021, "Rethinking attention with performers".

    Example:
        >>> phi = Favor(8, 4096)
        >>> q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) / 2
        >>> abs(phi(q) @ phi(k) / (q @ k / 8**0.5).exp() - 1).item() < 0.1
        True
    """

    positive = True
    projection: Tensor

    def __init__(
        self,
        head_dim: int,
        features: int | None = None,
        *,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.size = 4 * head_dim if features is None else features
        if head_dim < 1 or self.size < 1:
            raise refusal(
                ArgumentError,
                "sizes are too small",
                given=f"head_dim={head_dim}, features={features}",
                accepted="at least 1",
            )
        self.orthogonal = orthogonal
        self.register_buffer("projection", torch.empty(self.size, head_dim))
        self.redraw(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new w_r, as the paper does now and then in training; states made before belong to the old ones."""
        m, D = self.projection.shape
        directions = torch.randn(m, D, generator=generator)
        if self.orthogonal:
            lengths = directions.norm(dim=1, keepdim=True)
            blocks = [_random_rotation(D, generator) for _ in range(-(-m // D))]
            directions = lengths * torch.cat(blocks)[:m]
        self.projection.copy_(directions)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to features `[..., m]`."""
        small = x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25
        exponents = small @ self.projection.to(small).mT - small.square().sum(-1, keepdim=True) / 2
        features: Tensor = (exponents.exp() * self.size**-0.5).to(x.dtype)
        return features

    def extra_repr(self) -> str:
        """Say in `repr` how the map is set up."""
        return f"size={self.size}, orthogonal={self.orthogonal}"


def _random_rotation(D: int, generator: torch.Generator | None) -> Tensor:
    """A D x D orthogonal matrix, uniform: QR with the signs that make R's diagonal positive."""
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


class Hedgehog(nn.Module):
    """A learned map that can become as spiky as softmax: `[..., D] -> [..., 2 C]`.

        phi(x) = softmax([W x, -W x])    W [C, D], the identity at first

    One map for all heads of a layer, and for queries and keys alike.

    Args:
        head_dim: D.
        features: 2 C, even; 2 D when not given. Other sizes than 2 D begin with random orthogonal rows.

    Attributes:
        size: 2 C. positive: True.

    Source: Zhang et al. 2024, "The hedgehog & the porcupine", which learns a W for each head of queries and of keys.

    Example:
        >>> Hedgehog(4)(torch.randn(1, 2, 5, 4)).shape
        torch.Size([1, 2, 5, 8])
    """

    positive = True

    def __init__(self, head_dim: int, features: int | None = None) -> None:
        super().__init__()
        self.size = 2 * head_dim if features is None else features
        if head_dim < 1 or self.size < 2 or self.size % 2:
            raise refusal(
                ArgumentError,
                "features come in pairs",
                given=f"head_dim={head_dim}, features={features}",
                accepted="head_dim at least 1, features even and at least 2",
            )
        self.weight = nn.Parameter(torch.eye(self.size // 2, head_dim))
        if self.size != 2 * head_dim:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to features `[..., size]`."""
        projected = F.linear(x, self.weight.to(x))
        return torch.cat((projected, -projected), dim=-1).softmax(-1)

    def extra_repr(self) -> str:
        """Say in `repr` how the map is set up."""
        return f"size={self.size}"


# ---- by name ---------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One map of the catalogue.

    Attributes:
        make: head size D -> the map as a module.
        size: D -> its number of features C.
        positive: phi(q).phi(k) is never negative, which normalisation needs.
        function: the map itself; None if it has parameters, or random numbers, of its own.
    """

    make: Callable[[int], nn.Module]
    size: Callable[[int], int]
    positive: bool
    function: Callable[[Tensor], Tensor] | None = None


def _fixed(
    name: str, function: Callable[[Tensor], Tensor], size: Callable[[int], int], positive: bool = True
) -> dict[str, Entry]:
    return {name: Entry(lambda D: Fixed(function, name, size(D), positive), size, positive, function)}


def _same(D: int) -> int:
    return D


def _pairs(D: int) -> int:
    return (D + 1) * (D + 2) // 2


ELEMENTWISE = {
    key: entry
    for name, elementwise in MAPS.items()
    for key, entry in _fixed(name, elementwise.phi, _same, elementwise.positive).items()
}
CATALOGUE: dict[str, Entry] = {
    **ELEMENTWISE,
    **_fixed("softmax-features", softmax_features, _same),
    **_fixed("dpfp", dpfp, lambda D: 2 * D),
    **_fixed("quadratic-features", quadratic_features, _pairs),
    **_fixed("taylor-features", taylor_features, _pairs),
    "favor+": Entry(Favor, lambda D: 4 * D, positive=True),
    "hedgehog": Entry(Hedgehog, lambda D: 2 * D, positive=True),
}
NAMES = tuple(CATALOGUE)
POSITIVE = frozenset(name for name, entry in CATALOGUE.items() if entry.positive)


def make(name: str, head_dim: int) -> nn.Module:
    """A map of the catalogue as a module for head size D, with attributes `size` and `positive`.

    Raises:
        ArgumentError: an unknown name.

    Example:
        >>> phi = make("dpfp", 16)
        >>> phi.size, phi(torch.randn(1, 2, 5, 16)).shape
        (32, torch.Size([1, 2, 5, 32]))
    """
    if name not in CATALOGUE:
        raise unknown_name("feature map", name, CATALOGUE)
    return CATALOGUE[name].make(head_dim)


@functools.lru_cache(maxsize=64)
def _as_first_made(name: str, head_dim: int) -> nn.Module:
    """The map with values of its own that a name stands for in a call: at its first values, the same in every call."""
    return make(name, head_dim).requires_grad_(False)


# ---- in a call -------------------------------------------------------------------------------------------------------


def map_features(
    q: Tensor, k: Tensor, feature_map: FeatureMap, normalize: bool, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, str]:
    """Return q and k and the name of the map that the kernel still has to apply ("identity" where nothing is left).

    A callable gets `[B, H, T, D]` and returns `[B, H, T, C]`. If it has an attribute `positive` that is False it is
    refused with normalize=True; without that attribute it is trusted.
    """
    if isinstance(feature_map, str):
        if feature_map not in CATALOGUE:
            raise unknown_name("feature map", feature_map, CATALOGUE)
        if normalize and feature_map not in POSITIVE:
            named = ", ".join(sorted(POSITIVE))
            raise refusal(
                ArgumentError,
                f"similarities of {feature_map!r} may be negative and need normalize=False",
                given=f"feature_map={feature_map!r}, normalize=True",
                accepted=f"with normalize=True {named}, or a callable (for features: feature_map=lambda x: x)",
            )
        if feature_map in MAPS:
            return q, k, feature_map
        feature_map = CATALOGUE[feature_map].function or _as_first_made(feature_map, q.shape[-1])
    if not callable(feature_map):
        raise refusal(
            ArgumentError, "feature_map cannot be applied", given=repr(feature_map), accepted="a name or a callable"
        )
    if normalize and getattr(feature_map, "positive", True) is False:
        raise refusal(
            ArgumentError,
            "the feature map says positive=False: its similarities may be negative",
            given=f"feature_map={feature_map!r}, normalize=True",
            accepted="normalize=False",
        )
    if key_mask is not None:  # padding may hold NaN, which would reach the gradients of a map's parameters
        k = k.masked_fill(~key_mask[:, None, :, None], 0)
    fq, fk = _check_features(q, feature_map(q), feature_map(k), k)
    if autocasts(q.device.type):
        fq, fk = fq.to(q.dtype), fk.to(k.dtype)
    if fq.dtype != q.dtype or fk.dtype != k.dtype:
        raise refusal(
            DtypeError,
            "feature_map must keep the dtype",
            given=f"{fq.dtype} for q, {fk.dtype} for k",
            accepted=q.dtype,
        )
    return fq, fk, "identity"


def _check_features(q: Tensor, fq: object, fk: object, k: Tensor) -> tuple[Tensor, Tensor]:
    def shapes(x: object) -> str:
        return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__

    if isinstance(fq, Tensor) and isinstance(fk, Tensor) and fq.dim() == fk.dim() == 4:
        leading = fq.shape[:3] == q.shape[:3] and fk.shape[:3] == k.shape[:3]
        if leading and fq.shape[3] == fk.shape[3] and fq.shape[3] > 0:
            return fq, fk
    raise refusal(
        ShapeError,
        "feature_map must keep all sizes but the last",
        given=f"q {tuple(q.shape)} -> {shapes(fq)}, k {tuple(k.shape)} -> {shapes(fk)}",
        accepted="[B, H, T, D] -> [B, H, T, C] with one C >= 1 for q and k",
    )
