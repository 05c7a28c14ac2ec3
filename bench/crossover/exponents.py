"""Fit growth as exponents with 95 % intervals: N* with the head size, time and memory with the length."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from linattn.bench.crossover.tables import Group, crossing_of, grouped
from linattn.bench.measuring.cases import QUADRATIC_DIRECT, SDPA, Method, Problem
from linattn.bench.measuring.power_law import PowerLaw, fit_power_law
from linattn.cost import crossover, flops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from linattn.bench.measuring.results import Measurement

RIVALS = {SDPA: "SDPA", QUADRATIC_DIRECT: "our direct form"}
INTERVAL_SIGMAS = 3.92
"""A 95 % interval is this many sigmas wide."""
BAND_SIGMAS = 1.683
"""So is the band between the 20th and the 80th percentile of repeats that scatter normally."""
MEDIAN_OVER_MEAN = 1.2533
"""The standard error of a median over that of a mean."""
OCTAVES = 3
"""An exponent in N is fitted over this many octaves below the longest sequence: shorter calls are mostly overhead."""
LEAST_MIB = 1.0
"""Peaks below this are pages and thread stacks rather than the call's own memory."""


@dataclass(frozen=True)
class CrossingExponent:
    """N* = a D^p over the head sizes whose N* is bracketed.

    Attributes:
        series: what the head sizes share; its own D and M are 0.
        rival: against which N* is meant.
        law: p, None with fewer than three head sizes.
        by_flops: p of the length at which both forms take as many flops, over the same head sizes.
        heads, left_out: head sizes used, and those whose N* is not bracketed.
    """

    series: Group
    rival: Method
    law: PowerLaw | None
    by_flops: float | None
    heads: tuple[int, ...]
    left_out: tuple[int, ...]

    def __str__(self) -> str:
        mask = "causal" if self.series.is_causal else "non-causal"
        training = " training" if self.series.direction == "training" else ""
        what = f"{mask} {self.series.dtype}{training}: exponent of N*(D) against {RIVALS[self.rival]}"
        left = f"; not bracketed, left out: D = {', '.join(map(str, self.left_out))}" if self.left_out else ""
        if self.law is None:
            return f"{what}: bracketed at {len(self.heads)} head sizes, a fit needs 3{left}"
        heads = ", ".join(map(str, self.heads))
        return f"{what}: {self.law} over D = {heads} (by flops {self.by_flops:.2f}, by D^2 2){left}"


def crossing_exponents(measurements: Iterable[Measurement]) -> list[CrossingExponent]:
    """Fit N*(D) for each mask, dtype, direction, batch and number of heads, against each rival; M = D only."""
    series: dict[Group, dict[int, list[Measurement]]] = {}
    for group, members in grouped(measurements).items():
        if group.M == group.D:
            series.setdefault(replace(group, D=0, M=0), {})[group.D] = members
    return [_fit(key, rival, heads) for key, heads in series.items() if len(heads) > 1 for rival in RIVALS]


def _fit(series: Group, rival: Method, heads: dict[int, list[Measurement]]) -> CrossingExponent:
    points, left_out = [], []
    for D, measurements in heads.items():
        found = crossing_of(measurements, rival)
        if found is None:
            continue
        if found.value is None or not found.bracketed:
            left_out.append(D)
            continue
        # An interval that reaches beyond the lengths measured is at least as wide as to the last of them.
        low, high = max(found.low, found.smallest), min(found.high, found.largest)
        points.append((float(D), found.value, math.log(high / low) / INTERVAL_SIGMAS))
    balance = [(D, crossover(int(D), is_causal=series.is_causal), 0.0) for D, _, _ in points]
    theory = fit_power_law(balance)
    return CrossingExponent(
        series,
        rival,
        fit_power_law(points),
        theory.exponent if theory else None,
        tuple(int(D) for D, _, _ in points),
        tuple(left_out),
    )


def crossing_lines(measurements: Iterable[Measurement]) -> list[str]:
    """Format a line on each fit of N*(D)."""
    return [str(found) for found in crossing_exponents(measurements)]


@dataclass(frozen=True)
class MethodExponents:
    """Time and peak memory = a N^p of one method in one group, None where fewer than three lengths were measured.

    `flops` is the exponent of the flops that `linattn.cost` counts over the same lengths; `expected` that of the form.
    """

    method: Method
    group: Group
    time: PowerLaw | None
    memory: PowerLaw | None
    flops: float | None
    longest: int

    @property
    def expected(self) -> int:
        """2 where every query meets every key, 1 for sums."""
        return 2 if self.method.form == "direct" else 1


def method_exponents(measurements: Iterable[Measurement]) -> list[MethodExponents]:
    """Fit time and memory of each method of each group, over the longest lengths that it was measured on."""
    found = []
    for group, members in grouped(measurements).items():
        for method in dict.fromkeys(measurement.method for measurement in members):
            mine = [
                measurement
                for measurement in members
                if measurement.method == method and measurement.median_ms is not None
            ]
            if not mine:
                continue
            longest = max(measurement.problem.N for measurement in mine)
            mine = [measurement for measurement in mine if longest <= 2**OCTAVES * measurement.problem.N]
            found.append(
                MethodExponents(
                    method,
                    group,
                    _law(mine, lambda measurement: measurement.median_ms, _sigma_of_median),
                    _law(
                        mine,
                        lambda measurement: measurement.peak_mib if (measurement.peak_mib or 0) >= LEAST_MIB else None,
                    ),
                    _exponent(mine, lambda measurement: _counted(measurement.method, measurement.problem)),
                    longest,
                )
            )
    return found


def _law(
    measurements: Sequence[Measurement],
    value: Callable[[Measurement], float | None],
    sigma: Callable[[Measurement], float] = lambda measurement: 0.0,
) -> PowerLaw | None:
    return fit_power_law(
        [(measurement.problem.N, y, sigma(measurement)) for measurement in measurements if (y := value(measurement))]
    )


def _exponent(measurements: Sequence[Measurement], value: Callable[[Measurement], float | None]) -> float | None:
    law = _law(measurements, value)
    return law.exponent if law else None


def _sigma_of_median(measurement: Measurement) -> float:
    assert measurement.median_ms
    assert measurement.p20_ms
    assert measurement.p80_ms
    spread = (measurement.p80_ms - measurement.p20_ms) / measurement.median_ms / BAND_SIGMAS
    return MEDIAN_OVER_MEAN * spread / math.sqrt(len(measurement.samples_ms))


def _counted(method: Method, problem: Problem) -> float:
    """Return flops of the form, by `linattn.cost`."""
    sizes = {"B": problem.B, "H": problem.H, "N": problem.N, "D": problem.D, "M": problem.M}
    passes = (False, True) if problem.direction == "training" else (False,)
    return sum(flops(method.kernel, method.form, is_causal=problem.is_causal, backward=p, **sizes) for p in passes)
