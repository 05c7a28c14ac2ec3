"""Side-by-side timing: the same inputs, the same process, one repeat of each method in turn.

Interleaving spreads whatever else the machine does over all methods alike, and pairs the repeats, so that a ratio of
two methods can be bootstrapped round by round.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

MIN_ROUNDS = 3
MAX_ROUNDS = 60
SHORTEST_SAMPLE_MS = 1.0
"""On CPU shorter calls are repeated inside a sample until it lasts this long."""
WARM_UP_MS = 100.0
COMPILES_MS = 2000.0
FLUSH_BYTES = 256 * 2**20
"""Written before each call on a GPU: more than the L2 cache of any, so that no call finds its inputs there."""


@dataclass(frozen=True)
class Summary:
    """Milliseconds of one call: median, 20th and 80th percentile over the rounds."""

    median: float
    p20: float
    p80: float


def summarise(samples_ms: list[float]) -> Summary:
    """Compute median and 20-80 % band of at least one sample, by linear interpolation."""
    if len(samples_ms) == 1:
        return Summary(samples_ms[0], samples_ms[0], samples_ms[0])
    fifths = statistics.quantiles(samples_ms, n=5, method="inclusive")
    return Summary(statistics.median(samples_ms), fifths[0], fifths[3])


def side_by_side(
    calls: Mapping[str, Callable[[], T]], *, device: torch.device, budget_s: float
) -> tuple[dict[str, list[float]], dict[str, T]]:
    """Time every call in turn until about `budget_s` seconds are spent, at least `MIN_ROUNDS` rounds.

    The order is reversed from round to round, so that none always runs in the wake of the same other.

    Returns:
        samples in milliseconds by name, as many for each, in the order of the rounds; and what each call returned in
        the last round.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    estimate = {name: _warm_up(call, clock) for name, call in calls.items()}
    inner = {name: clock.calls_in_a_sample(ms) for name, ms in estimate.items()}
    round_ms = sum(estimate[name] * inner[name] for name in calls)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s * 1e3 / max(round_ms, 1e-3))))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    last: dict[str, T] = {}
    for i in range(rounds):
        names = list(calls)[:: 1 if i % 2 == 0 else -1]
        for name in names:
            ms, result = clock.time(calls[name], inner[name])
            samples[name].append(ms)
            if i == rounds - 1:
                last[name] = result
            del result
    return samples, last


def in_rounds(
    calls: Mapping[str, Callable[[], T]], *, device: torch.device, rep_ms: float, rounds: int = 2
) -> tuple[dict[str, list[float]], dict[str, T]]:
    """Time every call by `triton.testing.do_bench` for about `rep_ms` milliseconds, `rounds` times in turn.

    For GPUs: unlike `side_by_side` it does not wait after each call, so that short calls are not measured by the time
    that it takes to launch them. On other devices each round is a single call, to rehearse.

    Returns:
        as `side_by_side`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    last: dict[str, T] = {}

    def remembering(name: str) -> Callable[[], None]:
        def call() -> None:
            last.pop(name, None)
            last[name] = calls[name]()

        return call

    for _ in range(rounds):
        for name in calls:
            if device.type != "cuda":
                ms, last[name] = _CpuClock().time(calls[name], 1)
                samples[name].append(ms)
                continue
            from triton.testing import do_bench

            samples[name] += do_bench(remembering(name), warmup=20, rep=rep_ms, return_mode="all")
    return samples, last


def _warm_up(call: Callable[[], T], clock: _CpuClock | _CudaClock) -> float:
    """Run until caches, thread pools and compiled code are in place; the time of the last run, in milliseconds."""
    spent = 0.0
    for i in range(20):
        ms, _result = clock.time(call, 1)
        spent += ms
        # A first call that took seconds may have compiled: it tells nothing of the next.
        if spent > WARM_UP_MS and (i > 0 or ms < COMPILES_MS):
            break
    return ms


class _CpuClock:
    def calls_in_a_sample(self, ms: float) -> int:
        return max(1, round(SHORTEST_SAMPLE_MS / max(ms, 1e-3)))

    def time(self, call: Callable[[], T], count: int) -> tuple[float, T]:
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        return (time.perf_counter() - start) * 1e3 / count, result


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def calls_in_a_sample(self, ms: float) -> int:
        return 1

    def time(self, call: Callable[[], T], count: int) -> tuple[float, T]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # The write also keeps the device busy while the call is launched, so that launch time is not measured.
        self._flush.zero_()
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), result
