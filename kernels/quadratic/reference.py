"""Quadratic-kernel attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 2 in q.k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.reference.attention import Reference
from linattn.kernels.common.reference.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.quadratic.contract import Options


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Options) -> Problem:
    is_causal, q_offset, scale, c0, c1, c2, normalize = options
    return Problem(
        q, k, v, key_mask, is_causal, q_offset, scale, coefficients=(c0, c1, c2), normalize=normalize, degree=2
    )


_reference = Reference(_problem)
forward, backward = _reference.forward, _reference.backward
