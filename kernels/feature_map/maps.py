"""The feature maps that kernels apply themselves: elementwise, so that q and k travel unmapped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Map = Callable[[Tensor], Tensor]


def _elu_plus_one(x: Tensor) -> Tensor:
    """X + 1 for x > 0, else exp(x): `F.elu(x) + 1` would round to 0 below about x = -17 in fp32."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


# name: phi and its derivative, both as functions of x. "identity" stands for features computed before.
MAPS: dict[str, tuple[Map, Map]] = {
    "identity": (lambda x: x, torch.ones_like),
    "elu+1": (_elu_plus_one, lambda x: x.clamp(max=0).exp()),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
    "exp": (torch.exp, torch.exp),
}
