"""A sweep over lengths: measures what is missing, saves after every problem, can be interrupted and run again."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from linattn._util.progress import Bar, progress
from linattn.bench.crossover import tables
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method, Problem, supports
from linattn.bench.measuring.crossing import refine
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.measure import measure, select_affordable, useful_gflops
from linattn.bench.measuring.memory import MemoryProbe
from linattn.bench.measuring.results import Measurement, Results, resume
from linattn.bench.measuring.timing import MIN_ROUNDS, side_by_side
from linattn.errors import ArgumentError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


@dataclass(frozen=True)
class SweepPlan:
    """Extent of a sweep: lengths in octaves, seconds of timing a problem, and the longest call worth waiting for.

    Once the chunked form is the fastest on a length, the order is settled and calls longer than `settled_s` are no
    longer worth it. `refine` adds lengths near the crossings.
    """

    name: str
    smallest: int
    largest: int
    budget_s: float
    limit_s: float
    settled_s: float
    refine: bool

    def sizes(self) -> list[int]:
        """Return powers of 2 from the smallest to the largest."""
        return [N for N in (2**p for p in range(32)) if self.smallest <= N <= self.largest]

    @property
    def settings(self) -> dict[str, object]:
        """Describe the plan for a result file."""
        return {"plan": self.name, "budget_s": self.budget_s, "limit_s": self.limit_s, "settled_s": self.settled_s}


@dataclass
class Sweep:
    """One sweep: measures what is missing from the results and saves after every problem."""

    results: Results
    path: Path
    methods: Sequence[Method]
    plan: SweepPlan
    device: torch.device
    memory: MemoryProbe
    bar: Bar

    def group(self, problems: Sequence[Problem]) -> list[Measurement]:
        """Measure all lengths of one group in rising order, then, if the plan says so, lengths near the crossings."""
        measurements: list[Measurement] = []
        for problem in problems:
            measurements += self._rows(problem, self.plan.settled_s if _is_settled(measurements) else self.plan.limit_s)
            self.bar.update()
        if self.plan.refine:
            measured = sorted(
                {
                    measurement.problem.N
                    for measurement in measurements
                    if measurement.method != QUADRATIC_CHUNKED and measurement.samples_ms
                }
            )
            for rival in (SDPA, QUADRATIC_DIRECT):
                for N in refine(tables.crossing_of(measurements, rival), measured):
                    self._rows(replace(problems[0], N=N), self.plan.limit_s)
        wanted = tables.group_of(problems[0])
        return sorted(
            (
                measurement
                for measurement in self.results.measurements
                if tables.group_of(measurement.problem) == wanted
            ),
            key=lambda measurement: measurement.problem.N,
        )

    def _rows(self, problem: Problem, limit_s: float) -> list[Measurement]:
        found = self.results.measurements_of(problem)
        if not found:
            self.bar.set_postfix_str(str(problem))
            defined = [method for method in self.methods if supports(method, problem)]
            methods, skipped = select_affordable(defined, problem, self.results.measurements, limit_s)
            found = measure(problem, methods, device=self.device, budget_s=self.plan.budget_s, memory=self.memory)
            found += skipped
            self.results.measurements += found
            self.results.save(self.path)
        return found


def run_sweep(
    kind: str,
    groups: Sequence[Sequence[Problem]],
    methods: Sequence[Method],
    plan: SweepPlan,
    *,
    device: torch.device,
    folder: Path,
    fresh: bool,
) -> Results:
    """Measure every group, printing its table when it is done; what `folder` already holds is not measured again.

    Returns:
        the results, which are in `folder/results.json` and `.csv`.

    Raises:
        DataError: the folder cannot be written.
    """
    path, environment = folder / "results.json", describe(device)
    results = Results(kind, environment, plan.settings)
    if not fresh:
        results, aside = resume(path, kind, environment, plan.settings)
        if aside:
            print(aside, file=sys.stderr)
    _announce(groups, methods, results, plan, device, path)
    with MemoryProbe(device) as memory, progress(sum(map(len, groups)), "problem") as bar:
        results.settings["peak_memory"] = memory.how
        sweep = Sweep(results, path, methods, plan, device, memory, bar)
        for problems in groups:
            measurements = sweep.group(problems)
            bar.clear()
            print("\n" + tables.report(measurements), flush=True)
    return results


def add_run_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Declare the options that every measuring command has; `folder` is where results go when not said otherwise."""
    parser.add_argument("--out", type=Path, default=Path(folder), help="folder for results (%(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    parser.add_argument("--threads", type=int, help="torch threads on cpu (default: torch's own choice)")
    parser.add_argument("--no-figures", action="store_true", help="write no figures; needs no matplotlib")


def set_threads(count: int | None) -> None:
    """Do what `--threads` asks for."""
    if count is None:
        return
    if count < 1:
        raise ArgumentError(f"--threads got {count}; accepted: integers of at least 1")
    torch.set_num_threads(count)


def _is_settled(measurements: Sequence[Measurement]) -> bool:
    """Say whether the chunked form was the fastest on the longest length on which it was not alone."""
    for N in sorted({measurement.problem.N for measurement in measurements}, reverse=True):
        times = {
            measurement.method: measurement.median_ms
            for measurement in measurements
            if measurement.problem.N == N and measurement.median_ms is not None
        }
        ours = times.pop(QUADRATIC_CHUNKED, None)
        if ours is not None and times:
            return ours < min(times.values())
    return False


def _announce(
    groups: Sequence[Sequence[Problem]],
    methods: Sequence[Method],
    results: Results,
    plan: SweepPlan,
    device: torch.device,
    path: Path,
) -> None:
    """Say on stderr what is about to happen and about how long it will take."""
    problems = [p for group in groups for p in group]
    missing = [p for p in problems if not results.measurements_of(p)]
    message = (
        f"{len(problems)} problems on {results.environment.slug}, {len(problems) - len(missing)} already in {path}"
    )
    if missing:
        # Before anything is measured: SDPA at the rate it reaches on a middling problem, the others at half of it.
        sample = Problem(1024, 64, 64, H=missing[0].H, dtype=missing[0].dtype)
        q, k, v = sample.inputs(device)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        samples, _ = side_by_side({"sdpa": lambda: sdpa(q, k, v)}, device=device, budget_s=0.1)
        rate = useful_gflops(SDPA, sample) / (min(samples["sdpa"]) / 1e3)
        seconds = 0.0
        for problem in missing:
            calls = {
                m: useful_gflops(m, problem) / rate * (1 if m == SDPA else 2) for m in methods if supports(m, problem)
            }
            # Beyond twice the expected crossing the order is settled.
            settled = problem.N > 2 * problem.D**2
            limit_s = plan.settled_s if settled else plan.limit_s
            once = sum(s for s in calls.values() if s <= limit_s)
            # Warm-up, the rounds, and one more call for memory; near a crossing a few lengths are added.
            seconds += min(max(plan.budget_s, MIN_ROUNDS * once), 60 * once + 0.3) + 2 * once + 0.5
        message += f"; about {max(1.0, seconds * (1.3 if plan.refine else 1.0) / 60):.0f} min"
    print(message, file=sys.stderr, flush=True)
