"""Tabulate a result file: for the page, for the README, each from the file alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linattn.bench.crossover import exponents, tables
from linattn.bench.machine import roofline, scaling
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Problem
from linattn.bench.peers import verify
from linattn.bench.suite import targets
from linattn.cost import crossover
from linattn.errors import unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from linattn.bench.crossover.tables import Group
    from linattn.bench.measuring.crossing import Crossing
    from linattn.bench.measuring.results import Measurement, Results

SHOWN_N = 16384
"""The length at which the speed over SDPA is stated beside N*."""


@dataclass(frozen=True)
class Table:
    """A heading a column, and rows of text; `**words**` stand out."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Format the table as in a README."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def nstar(results: Results, direction: str) -> Table:
    """Tabulate N* of the chunked form and N*/D^2, with 95 % intervals, beside theory, for every D, mask and dtype."""
    head = (
        "D", "", "dtype", "N* against our direct form", "N*/D²", "N* against PyTorch's SDPA", "N*/D²",
        "equal flops: N", "N/D²", f"SDPA's time / ours at N = {SHOWN_N:,}",
    )  # fmt: skip
    rows = []
    for group, members in tables.grouped(results.measurements).items():
        if group.direction != direction:
            continue
        theory = crossover(group.D, group.M, is_causal=group.is_causal)
        against = [tables.crossing_of(members, rival) for rival in (QUADRATIC_DIRECT, SDPA)]
        cells = [text for found in against for text in (_length(found), _per_square(found, group.D))]
        mask = "causal" if group.is_causal else "non-causal"
        rows.append(
            (str(group.D), mask, group.dtype, *cells, f"{theory:.0f}", f"{theory / group.D**2:.2f}",
             _speedup(group, members))
        )  # fmt: skip
    return Table(head, tuple(rows))


def crossing_exponents(results: Results) -> Table:
    """Tabulate the exponent of N*(D), with its 95 % interval, against each rival."""
    head = (
        "",
        "dtype",
        "pass",
        "against",
        "exponent of N*(D)",
        "by flops",
        "excludes 2",
        "head sizes",
        "not bracketed",
    )
    rows = []
    for found in exponents.crossing_exponents(results.measurements):
        law, series = found.law, found.series
        rows.append(
            (
                "causal" if series.is_causal else "non-causal",
                series.dtype,
                _pass(series.direction),
                exponents.RIVALS[found.rival],
                "-" if law is None else str(law),
                "-" if found.by_flops is None else f"{found.by_flops:.2f}",
                "-" if law is None else "no" if law.holds(2.0) else "yes",
                ", ".join(map(str, found.heads)),
                ", ".join(map(str, found.left_out)),
            )
        )
    return Table(head, tuple(rows))


def scaling_exponents(results: Results) -> Table:
    """Tabulate exponents of time and memory in N, operation by operation."""
    return Table(scaling.HEADINGS, tuple(scaling.table(results.measurements)))


def roofline_places(results: Results) -> Table:
    """Tabulate each kernel below its ceiling."""
    return Table(roofline.HEADINGS, tuple(roofline.table(results)))


def peer_proofs(results: Results) -> Table:
    """Tabulate what every peer computes, and whether that was proved."""
    return Table(verify.HEADINGS, tuple(verify.table(verify.proofs_in(results))))


def targets_reached(results: Results) -> Table:
    """Tabulate speed targets and what was reached, fp32 beside bf16; what is reached stands out."""
    cases: dict[str, dict[str, tuple[str, str]]] = {}
    wanted = targets.AVX2_TARGETS if results.environment.instruction_set == "avx2" else targets.TARGETS
    for target in wanted:
        reached = target.reached(results.measurements)
        if reached is not None:
            text = f"**{reached:.2f}**" if reached >= target.goal else f"{reached:.2f}"
            cases.setdefault(_case(target), {})[target.problem.dtype] = (f"{target.goal:.2f}", text)
    rows = ((case, *cells.get("fp32", ("", "")), *cells.get("bf16", ("", ""))) for case, cells in cases.items())
    return Table(("case (B = 1)", "goal fp32", "reached", "goal bf16", "reached"), tuple(rows))


def measured(results: Results) -> Table:
    """Tabulate every measurement, as the terminal shows them."""
    groups = tables.grouped(results.measurements).items()
    rows = tuple((str(group), *tables.cells(one)) for group, members in groups for one in members)
    return Table(("group", *tables.HEADINGS), rows)


SECTIONS: dict[str, Callable[[Results], Table]] = {
    "nstar-forward": lambda results: nstar(results, "forward"),
    "nstar-training": lambda results: nstar(results, "training"),
    "exponents": crossing_exponents,
    "scaling": scaling_exponents,
    "roofline": roofline_places,
    "proofs": peer_proofs,
    "measured": measured,
    "targets": targets_reached,
}
"""Tables that a page may ask for by name."""


def section(name: str, results: Results) -> Table:
    """Return one table by name. Raises ArgumentError for an unknown one."""
    if name not in SECTIONS:
        raise unknown_name("section", name, SECTIONS)
    return SECTIONS[name](results)


def _length(found: Crossing | None) -> str:
    return "-" if found is None else str(found).removeprefix("N* = ").removeprefix("N* ")


def _per_square(found: Crossing | None, D: int) -> str:
    if found is None:
        return "-"
    if found.value is None:
        return f"< {found.smallest / D**2:.2f}" if found.always == "faster" else f"> {found.largest / D**2:.2f}"
    low = "<" if found.low < found.smallest else ""
    high = ">" if found.high > found.largest else ""
    bounds = max(found.low, found.smallest) / D**2, min(found.high, found.largest) / D**2
    return f"{found.value / D**2:.2f} [{low}{bounds[0]:.2f}, {high}{bounds[1]:.2f}]"


def _speedup(group: Group, measurements: Sequence[Measurement]) -> str:
    times = {one.method: one.median_ms for one in measurements if one.problem.N == SHOWN_N}
    theirs, ours = times.get(SDPA), times.get(QUADRATIC_CHUNKED)
    return "-" if not theirs or not ours else f"{theirs / ours:.1f}"


def _pass(direction: str) -> str:
    return "forward and backward" if direction == "training" else "forward"


def _case(target: targets.Target) -> str:
    problem: Problem = target.problem
    words = [
        target.method.name,
        f"D = {problem.D}",
        f"N = {problem.N:,}",
        *(() if problem.is_causal else ("non-causal",)),
        *(("forward and backward",) if problem.direction == "training" else ()),
        *(() if problem.H != 1 else ("one head",)),
        *(() if target.rival == SDPA else (f"against {target.rival.name}",)),
    ]
    return ", ".join(words)
