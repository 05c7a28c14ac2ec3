"""A similarity as the kernels evaluate it: a function of the product t = q.k with three constants."""

from __future__ import annotations

import math
from typing import NamedTuple

from linattn.kernels.common.op.conditioning import Coefficients, complete_square


class Similarity(NamedTuple):
    """kind          of t = q.k                 its derivative by t
    "softmax"     2^(a t), a = scale log2 e  ln2 a sim
    "square"      (a t + b)^2 + c            2 a (a t + b)
    "polynomial"  (a t + b) t + c            2 a t + b
    "linear"      a t                        a
    `slope` is the factor of the derivative that tiles leave out (mainloop.py) and that gradients get at the end.
    """

    kind: str
    a: float
    b: float
    c: float
    slope: float


def softmax(scale: float) -> Similarity:
    """Return exp(scale t), as a power of two."""
    return Similarity("softmax", scale * math.log2(math.e), 0.0, 0.0, scale)


def linear(scale: float) -> Similarity:
    """Return scale t."""
    return Similarity("linear", scale, 0.0, 0.0, scale)


def quadratic(scale: float, coefficients: Coefficients, normalize: bool) -> Similarity:
    """Return c0 + c1 s + c2 s^2 with s = scale t.

    A sum of squares cannot turn negative where it is divided by; without a division the polynomial itself keeps more
    digits, since its root may be far from all scores.
    """
    c0, c1, c2 = coefficients
    if not normalize:
        return Similarity("polynomial", c2 * scale * scale, c1 * scale, c0, 1.0)
    root = math.sqrt(c2)
    b, r = complete_square(coefficients)
    return Similarity("square", scale * root, b * root, r, 2 * scale * root)
