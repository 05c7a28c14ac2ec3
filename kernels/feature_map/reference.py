"""Feature-map linear attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 1 in
phi(q).phi(k).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.op.allocation import accumulation_dtype, empty_in_storage_order
from linattn.kernels.common.reference.attention import Reference
from linattn.kernels.common.reference.problem import Problem
from linattn.kernels.feature_map.maps import MAPS

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.feature_map.contract import Options

LINEAR = (0.0, 1.0, 0.0)


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Options) -> Problem:
    is_causal, q_offset, scale, name, normalize = options
    dtype = accumulation_dtype(q.dtype)
    if name != "identity":
        phi, _ = MAPS[name]
        q, k = phi(q.to(dtype)), phi(k.to(dtype))
    return Problem(q, k, v, key_mask, is_causal, q_offset, scale, coefficients=LINEAR, normalize=normalize, degree=1)


def _pullback(options: Options, dphi: Tensor, x: Tensor) -> Tensor:
    _, slope = MAPS[options.feature_map]
    return empty_in_storage_order(x, x.shape[3]).copy_(dphi * slope(x.to(dphi.dtype)))


_reference = Reference(_problem, _pullback)
forward, backward = _reference.forward, _reference.backward
