"""Where sums over features would lose digits, and what every backend does about it (kernels/quadratic/README.md)."""

from __future__ import annotations

Coefficients = tuple[float, float, float]

DIRECT_KEYS = 16
"""Queries that have seen fewer keys are ill-conditioned through sums over features: every form computes their scores.
`direct_keys` of kernels/quadratic/native/quadratic.hpp is the same number."""
ROUNDING = 1e-9
"""A remainder that is smaller, relative to what it is the difference of, is rounding."""


def complete_square(coefficients: Coefficients) -> tuple[float, float]:
    """Return b and r of c0 + c1 s + c2 s^2 = c2 (s + b)^2 + r; an r that is negative by rounding only is zero."""
    c0, c1, c2 = coefficients
    square = c1 * c1 / (4 * c2)
    r = c0 - square
    if -ROUNDING * max(abs(c0), abs(square)) <= r < 0:
        r = 0.0
    return c1 / (2 * c2), r
