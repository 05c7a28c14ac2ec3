"""The feature maps that kernels apply themselves: elementwise, so that q and k travel unmapped.

A new one takes three files: a row here, phi and its derivative in native/maps.hpp, and the same in gpu/maps.py
(README.md, "Adding an elementwise map").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable


class ElementwiseMap(NamedTuple):
    """One feature map, entry by entry.

    Attributes:
        phi: the map.
        slope: its derivative, as a function of x.
        native: its number in native/maps.hpp.
        positive: phi(q).phi(k) is never negative, which normalisation needs.
    """

    phi: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    native: int
    positive: bool = True


def _elu_plus_one(x: Tensor) -> Tensor:
    """Return x + 1 for x > 0, else exp(x): `F.elu(x) + 1` would round to 0 below about x = -17 in fp32."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


# "identity" stands for features computed before.
MAPS: dict[str, ElementwiseMap] = {
    "elu+1": ElementwiseMap(_elu_plus_one, lambda x: x.clamp(max=0).exp(), 1),
    "relu": ElementwiseMap(F.relu, lambda x: (x > 0).to(x.dtype), 2),
    "relu2": ElementwiseMap(lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x), 3),
    "exp": ElementwiseMap(torch.exp, torch.exp, 4),
    "identity": ElementwiseMap(lambda x: x, torch.ones_like, 0, positive=False),
}
