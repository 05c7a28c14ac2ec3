"""Build the part of the report on `make gpu`, whose record is a file of sections, not a list of measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn.bench.gpu import plots
from linattn.bench.gpu.stages import Record
from linattn.bench.report import page
from linattn.bench.report.page import Section
from linattn.bench.report.summaries import Table

if TYPE_CHECKING:
    from pathlib import Path

RECORD = "gpu.json"


def gpu_section(path: Path, *, figures: bool) -> Section:
    """Build the section on stages, tests, goals and measurements of one record.

    Raises:
        DataError: the file cannot be read.
    """
    record = Record(path)
    found = Section(f"GPU, {path.parent.name}", f"{path}: {_machines(record.section('environment'))}")
    failed = [
        f"{kind} {name}: {_state(entry)}"
        for kind, section in (("stage", "stages"), ("tests of", "tests"), ("fuzz", "fuzz"))
        for name, entry in record.section(section).items()
        if not _passed(entry)
    ]
    found.parts.append(page.notice(failed or ["every stage and test that was reached passed"], alarm=bool(failed)))
    goals = record.section("goals")
    if goals:
        found.parts += [page.heading("Goals"), page.table(_goals(goals))]
    if figures:
        found.parts += _pictures(record)
    rows = record.section("rows")
    if rows:
        found.parts.append(page.collapsible(f"all {len(rows)} rows", page.table(_rows(rows))))
    return found


def _machines(environments: dict[str, Any]) -> str:
    return "; ".join(
        f"{found['device']}, driver {found['driver']}, torch {found['torch']}, Triton {found['triton']}, "
        f"commit {found['commit']}, {found['date']}"
        for found in environments.values()
    )


def _passed(entry: dict[str, Any]) -> bool:
    return bool(entry["passed"]) if "passed" in entry else entry.get("state") == "done"


def _state(entry: dict[str, Any]) -> str:
    return str(entry.get("state") or entry.get("summary") or "failed")


def _goals(goals: dict[str, Any]) -> Table:
    def number(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "-"

    rows = []
    for key, goal in goals.items():
        measured = number(goal["measured"])
        rows.append(
            (
                key,
                f"{'at most' if goal['at_most'] else 'at least'} {number(goal['goal'])}",
                number(goal["stretch"]),
                f"**{measured}**" if goal["met"] else measured,
            )
        )
    return Table(("case", "goal", "stretch", "measured"), tuple(rows))


def _rows(rows: dict[str, Any]) -> Table:
    columns = ("ms", "p20_ms", "p80_ms", "TFLOP/s", "share of limit", "error", "gradient_error", "peak_mib")

    def cell(row: dict[str, Any], name: str) -> str:
        value = row.get(name)
        return f"{value:.3g}" if isinstance(value, float) else "-"

    return Table(
        ("row", *columns, "not run"),
        tuple(
            (key, *(cell(row, name) for name in columns), str(row.get("skipped") or row.get("failed") or ""))
            for key, row in rows.items()
        ),
    )


def _pictures(record: Record) -> list[str]:
    device = _machines(record.section("environment"))
    goals = {key: goal for key, goal in record.section("goals").items() if goal["measured"] is not None}
    sweeps = record.section("crossover")
    drawn = [page.picture(plots.draw_goals(goals, device), "Goals and what was reached")] if goals else []
    return drawn + (
        [page.picture(plots.draw_sweeps(sweeps, device), "Crossover against the fastest softmax")] if sweeps else []
    )
