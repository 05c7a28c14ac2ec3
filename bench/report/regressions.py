"""Find what became slower, larger or wrong since the last committed results: `linattn report` says it first.

A time is compared as its ratio to SDPA in the same rounds, so that a machine that is slower today accuses nobody. Rows
without SDPA are compared in milliseconds.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from linattn.bench.measuring.cases import DTYPES, SDPA, Problem
from linattn.bench.measuring.results import Measurement, Results
from linattn.errors import DataError
from linattn.testing import BUDGETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

RUN_TO_RUN = 0.10
"""Share by which two runs of the same code may differ beyond their repeats: clocks and neighbours drift."""
MEMORY_SHARE, MEMORY_MIB = 0.10, 2.0
"""A peak may grow by this share, and by this much, unnoticed: pages and thread stacks."""
DRAWS = 400
BAND = (0.025, 0.975)

Kind = Literal["slower", "larger", "wrong", "not measured"]


@dataclass(frozen=True)
class Flag:
    """One row that is worse than it was, or wrong.

    `before` and `now` are milliseconds, MiB or relative errors, as `kind` says; `detail` puts it into words.
    """

    kind: Kind
    method: str
    problem: str
    before: float | None
    now: float | None
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.method} on {self.problem}: {self.detail}"


def compare(now: Results, before: Results | None) -> list[Flag]:
    """Collect the flags of `now`: outputs beyond their error budget, and, where there is a `before`, what it did
    better.
    """
    flags = [flag for measurement in now.measurements for flag in find_wrong(measurement)]
    if before is None:
        return flags
    earlier = {(measurement.method, measurement.problem): measurement for measurement in before.measurements}
    reference, earlier_reference = _references(now.measurements), _references(before.measurements)
    same_memory = now.settings.get("peak_memory") == before.settings.get("peak_memory")  # measured in the same way
    for measurement in now.measurements:
        was = earlier.get((measurement.method, measurement.problem))
        if was is None:
            continue
        flags += _slower(
            measurement, was, reference.get(measurement.problem), earlier_reference.get(measurement.problem)
        )
        if same_memory:
            flags += _larger(measurement, was)
    return flags


def find_wrong(measurement: Measurement) -> list[Flag]:
    """Flag an output or gradient whose error is beyond the budget of its dtype, NaN included."""
    budget = BUDGETS[DTYPES[measurement.problem.dtype]]
    pairs = (("output", measurement.error, budget.forward), ("gradient", measurement.gradient_error, budget.gradient))
    return [
        Flag(
            "wrong",
            measurement.method.name,
            str(measurement.problem),
            limit,
            error,
            f"{what} is off by {error:.1e}, accepted: {limit:.0e}",
        )
        for what, error, limit in pairs
        if error is not None and not error <= limit
    ]


def log_slowdown(
    now: Measurement, before: Measurement, reference: Measurement | None, earlier_reference: Measurement | None
) -> tuple[float, float] | None:
    """Return log(time now / time before), each as a ratio to SDPA where both have it, and the half-width of its noise
    band.

    The band holds 95 % of what redrawing the rounds of both runs gives, plus `RUN_TO_RUN`.

    Returns:
        None where a time is missing.
    """
    both = reference is not None and earlier_reference is not None
    ours, theirs = _rounds(now, reference if both else None), _rounds(before, earlier_reference if both else None)
    if not ours or not theirs:
        return None
    generator = random.Random(0)
    change = _median_log(ours) - _median_log(theirs)
    drawn = sorted(
        _median_log(generator.choices(ours, k=len(ours))) - _median_log(generator.choices(theirs, k=len(theirs)))
        for _ in range(DRAWS)
    )
    low, high = (drawn[min(DRAWS - 1, int(p * DRAWS))] for p in BAND)
    return change, (high - low) / 2 + math.log1p(RUN_TO_RUN)


def _slower(
    measurement: Measurement, was: Measurement, reference: Measurement | None, earlier_reference: Measurement | None
) -> list[Flag]:
    # SDPA itself is what the others are measured by.
    if measurement.method == SDPA:
        return []
    if measurement.median_ms is None and was.median_ms is not None:
        detail = f"took {was.median_ms:.3g} ms before; now: {measurement.skipped}"
        return [Flag("not measured", measurement.method.name, str(measurement.problem), was.median_ms, None, detail)]
    found = log_slowdown(measurement, was, reference, earlier_reference)
    if found is None or found[0] <= found[1]:
        return []
    change, band = found
    against = "" if reference is None or earlier_reference is None else " as measured by SDPA in the same run"
    detail = (
        f"{math.exp(change):.2f} times the time it took{against}, noise up to {math.exp(band):.2f} "
        f"({was.median_ms:.3g} ms before, {measurement.median_ms:.3g} ms now)"
    )
    return [
        Flag("slower", measurement.method.name, str(measurement.problem), was.median_ms, measurement.median_ms, detail)
    ]


def _larger(measurement: Measurement, was: Measurement) -> list[Flag]:
    if measurement.peak_mib is None or was.peak_mib is None or measurement.method == SDPA:
        return []
    if measurement.peak_mib <= was.peak_mib * (1 + MEMORY_SHARE) + MEMORY_MIB:
        return []
    detail = f"peak memory {was.peak_mib:.1f} MiB before, {measurement.peak_mib:.1f} MiB now"
    return [
        Flag("larger", measurement.method.name, str(measurement.problem), was.peak_mib, measurement.peak_mib, detail)
    ]


def _references(measurements: Iterable[Measurement]) -> Mapping[Problem, Measurement]:
    return {
        measurement.problem: measurement
        for measurement in measurements
        if measurement.method == SDPA and measurement.samples_ms
    }


def _rounds(measurement: Measurement, reference: Measurement | None) -> list[tuple[float, float]]:
    """Return (time, SDPA's time in the same round) of every round; 1 for SDPA without a reference."""
    if not measurement.samples_ms:  # skipped
        return []
    theirs: Sequence[float] = [1.0] * len(measurement.samples_ms) if reference is None else reference.samples_ms
    # Rows of one problem are measured together, in as many rounds.
    return list(zip(measurement.samples_ms, theirs, strict=True))


def _median_log(rounds: Sequence[tuple[float, float]]) -> float:
    return math.log(statistics.median(a for a, _ in rounds) / statistics.median(b for _, b in rounds))


# ---- the last committed results --------------------------------------------------------------------------------------


def load_committed(path: Path, now: Results) -> tuple[Results, str] | None:
    """Load the last committed results that `path` can be compared with, and where they are from; None if there are
    none.

    For a file that git tracks: the committed version, or, where the file is that version, the one before it. For any
    other: the file of the same kind under `bench/results/<device>/` of the checkout that the file lies in.
    """
    root = _git(path.parent, "rev-parse", "--show-toplevel")
    if root is None:
        return None
    folder = Path(root.strip())
    name = path.resolve().relative_to(folder.resolve()).as_posix()
    if _git(folder, "ls-files", "--error-unmatch", name) is not None:
        versions = (_git(folder, "log", "--format=%h", "--", name) or "").split()
        places = [(version, name) for version in versions]
    else:
        listed = _git(folder, "ls-tree", "-r", "--name-only", "HEAD", f"bench/results/{now.environment.slug}/") or ""
        places = [("HEAD", file) for file in listed.splitlines() if file.endswith("/results.json")]
    for version, file in places:
        found = _load_version(folder, version, file)
        if found is not None and found.kind == now.kind and found != now:
            return found, f"{file} at {version}, measured {found.environment.date}"
    return None


def _load_version(root: Path, version: str, file: str) -> Results | None:
    text = _git(root, "show", f"{version}:{file}")
    if text is None:
        return None
    try:
        return Results.parse(json.loads(text), f"{version}:{file}")
    except (DataError, ValueError):
        # A result of another kind, or of a schema that is no longer read.
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
