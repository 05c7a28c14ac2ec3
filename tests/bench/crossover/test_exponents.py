"""Exponents: found where they were put, with intervals that hold them, and not claimed from two points."""

from __future__ import annotations

import math
import random

import pytest

from linattn.bench.crossover import exponents
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Problem
from linattn.bench.measuring.power_law import STUDENT_975, fit_power_law
from linattn.bench.measuring.results import Measurement


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.93, 2.0])
def test_a_power_law_is_found_exactly(exponent: float) -> None:
    law = fit_power_law([(x, 3.7 * x**exponent, 0.05) for x in (16, 32, 64, 128)])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.low < exponent < law.high
    assert law.points == 4


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, held = random.Random(0), 0
    for _ in range(400):
        points = [
            (x, x**2 * math.exp(generator.gauss(0, s)), s) for x, s in ((16, 0.3), (32, 0.1), (64, 0.05), (128, 0.05))
        ]
        law = fit_power_law(points)
        held += law.holds(2.0)
    # Student's interval with sigmas never scaled down: at least 95 %, give or take 2 % for 400 draws.
    assert held / 400 >= 0.93


def test_points_count_by_their_uncertainty() -> None:
    # Four points on x^2 and one far off that says so itself.
    points = [(2**i, 4.0**i, 0.02) for i in range(5)]
    wild = (32.0, 4.0**5 * 4, 5.0)
    assert fit_power_law([*points, wild]).exponent == pytest.approx(2.0, abs=0.01)
    assert fit_power_law([*points, (*wild[:2], 0.02)]).exponent > 2.1


def test_scatter_beyond_the_sigmas_widens_the_interval() -> None:
    def width(wobble: float) -> float:
        law = fit_power_law([(2**i, 4.0**i * math.exp(wobble * (-1) ** i), 0.01) for i in range(6)])
        return law.high - law.low

    assert width(0.2) == pytest.approx(20 * width(0.01), rel=0.2)


def test_two_points_make_no_law() -> None:
    assert fit_power_law([(1, 1, 0.1), (2, 2, 0.1)]) is None
    assert fit_power_law([(1, 1, 0.1), (2, 2, 0.1), (2, 2.1, 0.1)]) is None


def test_students_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(STUDENT_975, 1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)


def measurements_of(
    D: int, star: float, *, sizes=tuple(2**p for p in range(5, 16)), direction="forward"
) -> list[Measurement]:
    """SDPA and direct N^2, chunked crossing both at `star`."""
    measurements = []
    for N in sizes:
        for method, ms in ((SDPA, N * N), (QUADRATIC_DIRECT, N * N), (QUADRATIC_CHUNKED, N * star)):
            problem = Problem(N, D, D, direction=direction)
            measurements.append(Measurement(method, problem, "x", [ms] * 3, ms, ms, ms, peak_mib=N / 16))
    return measurements


def test_n_star_grows_as_it_was_made_to() -> None:
    measurements = [measurement for D in (16, 32, 64, 128) for measurement in measurements_of(D, 0.6 * D**1.9)]
    against_sdpa, against_direct = exponents.crossing_exponents(measurements)
    assert against_sdpa.rival == SDPA
    assert against_direct.rival == QUADRATIC_DIRECT
    assert against_sdpa.law.exponent == pytest.approx(1.9, abs=1e-6)
    assert against_sdpa.heads == (16, 32, 64, 128)
    assert against_sdpa.left_out == ()
    # Equal flops: C = (D+1)(D+2)/2 grows as D^1.93 over these sizes.
    assert against_sdpa.by_flops == pytest.approx(1.928, abs=2e-3)
    assert "non-causal fp32: exponent of N*(D) against SDPA: 1.90 [" in str(against_sdpa)


def test_what_is_not_bracketed_is_left_out_of_the_fit() -> None:
    measurements = [
        measurement for D in (16, 32, 64) for measurement in measurements_of(D, 0.6 * D**2)
    ] + measurements_of(128, 20000)
    found = exponents.crossing_exponents(measurements)[0]
    assert found.heads == (16, 32, 64)
    assert found.left_out == (128,)
    assert found.law.exponent == pytest.approx(2.0, abs=1e-6)
    assert "left out: D = 128" in str(found)
    few = exponents.crossing_exponents([measurement for measurement in measurements if measurement.problem.D > 32])[0]
    assert few.law is None
    assert "a fit needs 3" in str(few)


def test_directions_are_fitted_apart() -> None:
    measurements = [
        measurement
        for D in (16, 32, 64)
        for d in ("forward", "training")
        for measurement in measurements_of(D, 0.6 * D**2, direction=d)
    ]
    assert [g.series.direction for g in exponents.crossing_exponents(measurements)] == ["forward"] * 2 + [
        "training"
    ] * 2


def test_methods_grow_with_the_length() -> None:
    sdpa, direct, chunked = exponents.method_exponents(measurements_of(64, 3000.0))
    assert (sdpa.expected, direct.expected, chunked.expected) == (2, 2, 1)
    assert sdpa.time.exponent == pytest.approx(2.0)
    assert chunked.time.exponent == pytest.approx(1.0)
    assert chunked.memory.exponent == pytest.approx(1.0)
    assert sdpa.flops == pytest.approx(2.0)
    assert chunked.flops == pytest.approx(1.0)
    assert chunked.longest == 32768
    # The longest three octaves: 4096, 8192, 16384, 32768.
    assert chunked.time.points == 4


def test_peaks_below_a_mebibyte_are_not_fitted() -> None:
    found = exponents.method_exponents(measurements_of(64, 3000.0, sizes=(4, 8, 16, 32)))
    assert all(entry.memory is None for entry in found)
