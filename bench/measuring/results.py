"""Keep measurements on disk: JSON with the environment and every sample, and the same as CSV for spreadsheets.

A file is written after every problem, whole and by renaming, so an interrupted run leaves a valid file behind; the next
run continues it when machine, versions, measured sources and plan are the same.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from linattn._util.files import write_json, write_text
from linattn.bench.measuring.cases import Method, Problem
from linattn.bench.measuring.environment import Environment
from linattn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SCHEMA = 1


@dataclass(frozen=True)
class Measurement:
    """One method on one problem.

    Times are milliseconds of one call. `sdpa_ratio` is the time of SDPA divided by this one's: above 1 is faster than
    SDPA. `gflops` counts the useful work of `linattn.cost` in 1e9 flops, `peak_mib` what the call takes beyond its
    inputs. A method that was not run has no samples and says why in `skipped`.
    """

    method: Method
    problem: Problem
    backend_used: str = ""
    samples_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    sdpa_ratio: float | None = None
    gflops: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    judged_rows: int = 0
    peak_mib: float | None = None
    skipped: str | None = None

    @property
    def gflops_per_s(self) -> float | None:
        """Useful work done in a second."""
        if self.gflops is None or not self.median_ms:
            return None
        return self.gflops / self.median_ms * 1e3


@dataclass
class Results:
    """The content of a result file."""

    kind: str
    environment: Environment
    settings: dict[str, object]
    measurements: list[Measurement] = field(default_factory=list)

    def measurements_of(self, problem: Problem) -> list[Measurement]:
        """Return the measurements of one problem, in the order they were measured."""
        return [measurement for measurement in self.measurements if measurement.problem == problem]

    def save(self, path: Path) -> None:
        """Write `path` and, beside it, the same name with .csv.

        Raises:
            DataError: the folder cannot be made or written; an earlier file is left as it was.
        """
        data = {
            "schema": SCHEMA,
            "kind": self.kind,
            "environment": asdict(self.environment),
            "settings": self.settings,
            "rows": [asdict(measurement) for measurement in self.measurements],
        }
        write_json(path, data)
        write_text(path.with_suffix(".csv"), _as_csv(self.measurements))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a result file.

        Raises:
            DataError: there is none, it cannot be read, or it is of another schema.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise DataError(f"cannot read result file {path}: {problem}") from problem
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: object, name: str) -> Results:
        """Build the results of a file called `name` from its JSON.

        Raises:
            DataError: it is of another schema, or something is missing.
        """
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise DataError(f"result file {name} has schema {schema!r}; accepted: {SCHEMA}")
        assert isinstance(data, dict)
        try:
            measurements = [
                Measurement(
                    **{
                        **measurement,
                        "method": Method(**measurement["method"]),
                        "problem": Problem(**measurement["problem"]),
                    }
                )
                for measurement in data["rows"]
            ]
            return cls(data["kind"], Environment(**data["environment"]), data["settings"], measurements)
        except (KeyError, TypeError) as problem:
            raise DataError(f"result file {name} is damaged: {problem}") from problem


def resume(path: Path, kind: str, environment: Environment, settings: dict[str, object]) -> tuple[Results, str | None]:
    """Return the results to go on with: those in `path` when they can stand beside new ones, else empty ones.

    A file from another machine, of other versions, sources or another plan is kept as `NAME.previous.json`: nothing is
    mixed, nothing is lost.

    Returns:
        the results, and a sentence on why an existing file was put aside, if one was.
    """
    fresh = Results(kind, environment, settings)
    if not path.exists():
        return fresh, None
    try:
        found = Results.load(path)
    except DataError as problem:
        reason = str(problem)
    else:
        same_plan = (found.kind, found.settings.get("plan")) == (kind, settings.get("plan"))
        if same_plan and found.environment.comparable() == environment.comparable():
            found.settings = settings
            return found, None
        what = "from another machine, other versions or other sources" if same_plan else "measured by another plan"
        reason = f"{path} is {what} ({found.environment.date})"
    aside = path.with_suffix(".previous.json")
    try:
        path.replace(aside)
    except OSError as problem:
        raise DataError(f"cannot put {path} aside: {problem}") from problem
    return fresh, f"{reason}; kept as {aside.name}, measuring afresh"


def _as_csv(measurements: Iterable[Measurement]) -> str:
    problem_fields = [f.name for f in fields(Problem)]
    method_fields = [f.name for f in fields(Method)]
    row_fields = [f.name for f in fields(Measurement) if f.name not in ("method", "problem", "samples_ms")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *method_fields[1:], *problem_fields, "rounds", *row_fields, "gflops_per_s"])
    for measurement in measurements:
        writer.writerow(
            [
                *(getattr(measurement.method, name) for name in method_fields),
                *(getattr(measurement.problem, name) for name in problem_fields),
                len(measurement.samples_ms),
                *(_rounded(getattr(measurement, name)) for name in row_fields),
                _rounded(measurement.gflops_per_s),
            ]
        )
    return text.getvalue()


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
