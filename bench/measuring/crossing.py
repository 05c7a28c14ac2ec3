"""N*, the length from which one method is faster than another: interpolated, with an uncertainty from the repeats."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

BRACKET = 2
"""Measured sizes on which the order must hold on each side of N* before N* counts."""
TIE = math.log(1.03)
"""Times within 3 % of each other are equal: the chunked form of a sequence of one chunk is the direct form."""
DRAWS = 1000
INTERVAL = (0.025, 0.975)

Samples = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Crossing:
    """The size at which the ratio of two times passes 1 for the last time.

    Attributes:
        value: N*, None when the order never changes within the sizes measured.
        low, high: 95 % interval by bootstrap over the rounds; 0 or infinity where it reaches beyond the sizes measured.
        bracketed: the order holds on two sizes on each side.
        smallest, largest: the sizes measured.
        always: the order when there is no crossing: "faster" at every size, or "slower" at the largest one.
    """

    value: float | None
    low: float
    high: float
    bracketed: bool
    smallest: int
    largest: int
    always: str | None = None

    def __str__(self) -> str:
        if self.value is None:
            return f"N* < {self.smallest}" if self.always == "faster" else f"N* > {self.largest}"
        low = f"<{self.smallest}" if self.low < self.smallest else f"{self.low:.0f}"
        high = f">{self.largest}" if self.high > self.largest else f"{self.high:.0f}"
        return f"N* = {self.value:.0f} [{low}, {high}]" + ("" if self.bracketed else " (not bracketed)")


def find_crossing(ours: Samples, theirs: Samples, *, seed: int = 0) -> Crossing | None:
    """Find N*, from which `ours` takes less time than `theirs`, each samples in milliseconds by size.

    The ratio of medians is interpolated linearly in log N against log ratio; ratios within 3 % of 1 count as 1. Of
    several crossings the last counts: from there on ours is faster at every size measured. Samples taken in the same
    round are drawn together.

    Returns:
        None when fewer than two sizes have both, in as many rounds.
    """
    sizes = sorted(N for N in ours if N in theirs and len(ours[N]) == len(theirs[N]) > 0)
    if len(sizes) < 2:
        return None
    ratios = [_log_ratio(ours[N], theirs[N], range(len(ours[N]))) for N in sizes]
    value = _last_upward(sizes, ratios)
    if value == 0 or math.isinf(value):
        always = "faster" if value == 0 else "slower"
        return Crossing(None, math.nan, math.nan, False, sizes[0], sizes[-1], always)

    generator = random.Random(seed)
    drawn = sorted(_last_upward(sizes, [_redrawn(ours[N], theirs[N], generator) for N in sizes]) for _ in range(DRAWS))
    low, high = (drawn[min(DRAWS - 1, int(p * DRAWS))] for p in INTERVAL)
    return Crossing(value, min(low, value), max(high, value), _is_bracketed(sizes, ratios, value), sizes[0], sizes[-1])


def refine(crossing: Crossing | None, sizes: Sequence[int], multiple: int = 16) -> list[int]:
    """Choose sizes worth adding near a crossing: the geometric middle of its interval and of the intervals beside it.

    Beyond the longest size an interval of an octave is thought of, so that a crossing in the last one can be bracketed.
    """
    if crossing is None or crossing.value is None:
        return []
    ordered = [*sorted(sizes), 2 * max(sizes)]
    near = [i for i, (a, b) in enumerate(pairwise(ordered)) if a <= crossing.value <= b]
    wanted = {i + step for i in near for step in (-1, 0, 1)}
    middles = [
        round(math.sqrt(a * b) / multiple) * multiple for i, (a, b) in enumerate(pairwise(ordered)) if i in wanted
    ]
    return sorted(set(middles) - set(sizes))


def _last_upward(sizes: Sequence[int], log_ratios: Sequence[float]) -> float:
    """Find the last size where the ratio rises through 1: 0 when it is above 1 everywhere, infinity when below at the
    end.
    """
    if log_ratios[-1] <= 0:
        return math.inf
    for i in reversed(range(len(sizes) - 1)):
        if log_ratios[i] <= 0:
            share = -log_ratios[i] / (log_ratios[i + 1] - log_ratios[i])
            return float(sizes[i] * (sizes[i + 1] / sizes[i]) ** share)
    return 0.0


def _redrawn(ours: Sequence[float], theirs: Sequence[float], generator: random.Random) -> float:
    return _log_ratio(ours, theirs, generator.choices(range(len(ours)), k=len(ours)))


def _log_ratio(ours: Sequence[float], theirs: Sequence[float], rounds: Sequence[int]) -> float:
    ratio = math.log(statistics.median(theirs[i] for i in rounds) / statistics.median(ours[i] for i in rounds))
    return 0.0 if abs(ratio) < TIE else ratio


def _is_bracketed(sizes: Sequence[int], log_ratios: Sequence[float], value: float) -> bool:
    below = [r for N, r in zip(sizes, log_ratios, strict=True) if value >= N][-BRACKET:]
    above = [r for N, r in zip(sizes, log_ratios, strict=True) if value < N][:BRACKET]
    return len(below) == len(above) == BRACKET and max(below) <= 0 < min(above)
