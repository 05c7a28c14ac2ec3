"""N*: found where it was put, with an interval that holds it, and not claimed where it was not measured."""

from __future__ import annotations

import math
import random

import pytest

from linattn.bench.measuring.crossing import Crossing, find_crossing, refine

SIZES = [128 * 2**i for i in range(8)]


def samples(time, *, sizes=SIZES, noise: float = 0.0, rounds: int = 15, seed: int = 0) -> dict[int, list[float]]:
    generator = random.Random(seed)
    return {N: [time(N) * math.exp(generator.gauss(0, noise)) for _ in range(rounds)] for N in sizes}


def crossing_of(ours: dict[int, list[float]], theirs: dict[int, list[float]]) -> Crossing:
    found = find_crossing(ours, theirs)
    assert found is not None
    return found


def interval(crossing: Crossing) -> tuple[float, float, float]:
    assert crossing.low is not None
    assert crossing.value is not None
    assert crossing.high is not None
    return crossing.low, crossing.value, crossing.high


@pytest.mark.parametrize("true", [300.0, 1200.0, 2900.0])
def test_crossing_of_power_laws_is_exact(true: float) -> None:
    crossing = crossing_of(samples(lambda N: N * true), samples(lambda N: N * N))
    assert crossing.value == pytest.approx(true, rel=1e-9)
    assert crossing.low == crossing.high == crossing.value
    assert crossing.bracketed


def test_interval_covers_the_truth_under_noise() -> None:
    covered = 0
    for seed in range(20):
        ours = samples(lambda N: N * 1000, noise=0.1, seed=seed)
        theirs = samples(lambda N: N * N, noise=0.1, seed=100 + seed)
        low, value, high = interval(crossing_of(ours, theirs))
        assert low < value < high
        covered += low <= 1000 <= high
    assert covered >= 17


def test_noise_common_to_a_round_cancels() -> None:
    # Rounds ten times slower than others, for both methods alike: drawn in pairs they cannot move the ratio.
    weather = [random.Random(7).choice((1.0, 10.0)) for _ in range(15)]
    ours = {N: [N * 1000 * w for w in weather] for N in SIZES}
    theirs = {N: [N * N * w for w in weather] for N in SIZES}
    low, value, high = interval(crossing_of(ours, theirs))
    assert high - low < 1e-6 * value


def test_never_crossing_is_said() -> None:
    faster = crossing_of(samples(lambda N: 1), samples(lambda N: N))
    slower = crossing_of(samples(lambda N: N * N), samples(lambda N: 1))
    assert (faster.value, faster.always, str(faster)) == (None, "faster", "N* < 128")
    assert (slower.value, slower.always, str(slower)) == (None, "slower", "N* > 16384")


@pytest.mark.parametrize(("true", "bracketed"), [(200, False), (300, True), (7000, True), (9000, False)])
def test_two_sizes_are_needed_on_each_side(true: float, bracketed: bool) -> None:
    crossing = crossing_of(samples(lambda N: N * true), samples(lambda N: N * N))
    assert crossing.bracketed is bracketed
    assert ("not bracketed" in str(crossing)) is not bracketed


def test_last_of_several_crossings_counts_and_a_relapse_unbrackets() -> None:
    theirs = samples(lambda N: 10.0)
    ours = {N: [t] * 15 for N, t in zip(SIZES, (20, 5, 20, 20, 20, 5, 5, 5), strict=True)}
    crossing = crossing_of(ours, theirs)
    assert SIZES[4] < interval(crossing)[1] < SIZES[5]
    assert crossing.bracketed
    ours[SIZES[3]] = [5] * 15
    assert not crossing_of(ours, theirs).bracketed


def test_ties_are_not_faster() -> None:
    # The chunked form of up to one chunk is the direct form: times differ by noise only, until 1024.
    theirs = samples(lambda N: N * N)
    ours = {N: [N * N * (0.98 if N <= 1024 else 0.5)] * 15 for N in SIZES}
    assert crossing_of(ours, theirs).value == 1024


def test_only_sizes_that_both_were_measured_on_count() -> None:
    ours, theirs = samples(lambda N: N * 1000), samples(lambda N: N * N)
    for N in SIZES[4:]:
        theirs[N] = []
    crossing = crossing_of(ours, theirs)
    assert (crossing.smallest, crossing.largest) == (SIZES[0], SIZES[3])
    assert find_crossing({128: [1.0]}, {128: [2.0]}) is None


def test_refine_adds_middles_next_to_the_crossing_only() -> None:
    crossing = crossing_of(samples(lambda N: N * 3000), samples(lambda N: N * N))
    assert refine(crossing, SIZES) == [1456, 2896, 5792]
    assert refine(None, SIZES) == []
    last = crossing_of(samples(lambda N: N * 12000), samples(lambda N: N * N))
    # Half an octave beyond the longest: with it the crossing in the last interval has two lengths above it.
    assert refine(last, SIZES) == [5792, 11584, 23168]
    assert refine(crossing_of(samples(lambda N: 1), samples(lambda N: N)), SIZES) == []
