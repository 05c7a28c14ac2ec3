"""Rows as text: the table by case, and the line on N* that closes each head size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method, Problem
from linattn.bench.measuring.crossing import Crossing, find_crossing
from linattn.cost import crossover

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from linattn.bench.measuring.results import Measurement

HEADINGS = ("N", "method", "backend", "ms", "20-80 %", "SDPA/this", "GFLOP/s", "error", "peak MiB")


@dataclass(frozen=True)
class Group:
    """Problems that differ in N only: one panel of a figure, one block of a table, one N*."""

    D: int
    M: int
    B: int
    H: int
    dtype: str
    is_causal: bool
    direction: str

    def __str__(self) -> str:
        training = " training" if self.direction == "training" else ""
        return f"D={self.D} {'causal' if self.is_causal else 'non-causal'} {self.dtype}{training}"


def group_of(problem: Problem) -> Group:
    """Return the group that a problem belongs to."""
    p = problem
    return Group(p.D, p.M, p.B, p.H, p.dtype, p.is_causal, p.direction)


def grouped(measurements: Iterable[Measurement]) -> dict[Group, list[Measurement]]:
    """Sort measurements into groups: groups by head size and then causal last, measurements by N."""
    groups: dict[Group, list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(group_of(measurement.problem), []).append(measurement)
    ordered = sorted(groups, key=lambda g: (g.direction, g.dtype, g.is_causal, g.D))
    return {group: sorted(groups[group], key=lambda measurement: measurement.problem.N) for group in ordered}


def crossing_of(measurements: Sequence[Measurement], than: Method, ours: Method = QUADRATIC_CHUNKED) -> Crossing | None:
    """Find N* of `ours` against `than` within one group."""

    def samples(method: Method) -> dict[int, list[float]]:
        return {
            measurement.problem.N: measurement.samples_ms
            for measurement in measurements
            if measurement.method == method and measurement.samples_ms
        }

    return find_crossing(samples(ours), samples(than))


def table(measurements: Sequence[Measurement]) -> str:
    """Format the measurements of one group as an aligned table, in the order given."""
    lines = [HEADINGS, *(cells(measurement) for measurement in measurements)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    left = (1, 2)
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def crossing_lines(group: Group, measurements: Sequence[Measurement]) -> list[str]:
    """Format N* of the chunked form: against our direct form, and, last, against SDPA beside the theory."""
    lines = []
    against_direct = crossing_of(measurements, QUADRATIC_DIRECT)
    if against_direct is not None:
        lines.append(f"{group}: {against_direct} against our direct form{_per_square(against_direct, group.D)}")
    against_sdpa = crossing_of(measurements, SDPA)
    if against_sdpa is not None:
        flops = crossover(group.D, group.M, is_causal=group.is_causal)
        theory = f"theory N* = {flops:.0f} by flops, {crossover(group.D, group.M, count='textbook'):.0f} by D^2"
        lines.append(f"{group}: {against_sdpa} against SDPA{_per_square(against_sdpa, group.D)}, {theory}")
    return lines


def report(measurements: Iterable[Measurement]) -> str:
    """Format every group: its heading, its table, its lines on N*."""
    blocks = []
    for group, members in grouped(measurements).items():
        heading = f"{group}, B={group.B} H={group.H} M={group.M}"
        blocks.append("\n".join([heading, table(members), *crossing_lines(group, members)]))
    return "\n\n".join(blocks)


def _per_square(crossing: Crossing, D: int) -> str:
    return "" if crossing.value is None else f", N*/D^2 = {crossing.value / D**2:.2f}"


def cells(measurement: Measurement) -> tuple[str, ...]:
    """Format one measurement under `HEADINGS`."""
    start = (str(measurement.problem.N), measurement.method.name, measurement.backend_used)
    if measurement.median_ms is None or measurement.p20_ms is None or measurement.p80_ms is None:
        return (*start, "-", measurement.skipped or "-", "-", "-", "-", "-")
    return (
        *start,
        _three_digits(measurement.median_ms),
        f"{_three_digits(measurement.p20_ms)}-{_three_digits(measurement.p80_ms)}",
        "-" if measurement.sdpa_ratio is None else f"{measurement.sdpa_ratio:.2f}x",
        "-" if measurement.gflops_per_s is None else _three_digits(measurement.gflops_per_s),
        "-" if measurement.error is None else f"{max(measurement.error, measurement.gradient_error or 0.0):.0e}",
        "-" if measurement.peak_mib is None else f"{measurement.peak_mib:.1f}",
    )


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
