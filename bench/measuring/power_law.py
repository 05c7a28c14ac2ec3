"""y = a x^p through measured points: the exponent, with a 95 % interval that follows from the points' uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_SIGMA = 0.01
"""No measured time is better known than to 1 %, however alike its repeats are."""
FEWEST = 3
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class PowerLaw:
    """The exponent of a fitted power law, its 95 % interval, and the number of points it rests on."""

    exponent: float
    low: float
    high: float
    points: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def holds(self, exponent: float) -> bool:
        """Say whether the interval contains an exponent."""
        return self.low <= exponent <= self.high


def fit_power_law(points: Sequence[tuple[float, float, float]]) -> PowerLaw | None:
    """Fit log y on log x by least squares, each point `(x, y, sigma of log y)` weighted by 1 / sigma^2.

    Where the points scatter about the line by more than their sigmas say, all sigmas are scaled up until they say so
    (Birge's ratio); the interval is Student's, with as many degrees of freedom as there are points beyond two.

    Returns:
        None with fewer than three different x: two points lie on a line whatever they are.
    """
    if len({x for x, _, _ in points}) < FEWEST:
        return None
    x, y = (np.log([point[i] for point in points]) for i in (0, 1))
    weight = 1 / np.maximum([point[2] for point in points], LEAST_SIGMA) ** 2
    centre = np.average(x, weights=weight)
    spread = np.sum(weight * (x - centre) ** 2)
    exponent = float(np.sum(weight * (x - centre) * y) / spread)
    residual = y - np.average(y, weights=weight) - exponent * (x - centre)
    freedom = len(points) - 2
    birge = max(1.0, math.sqrt(float(np.sum(weight * residual**2)) / freedom))
    half = STUDENT_975[min(freedom, len(STUDENT_975)) - 1] * birge / math.sqrt(float(spread))
    return PowerLaw(exponent, exponent - half, exponent + half, len(points))
