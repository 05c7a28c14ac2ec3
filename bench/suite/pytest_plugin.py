"""Add to pytest what `pytest --benchmark` needs: the fixture that measures, the result file, the table at the end.

The root conftest.py registers it when the option is given, and only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from linattn._util.environment import pick_device
from linattn.bench.crossover import tables
from linattn.bench.measuring.cases import SDPA, Method, Problem
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.measure import measure, select_affordable
from linattn.bench.measuring.memory import MemoryProbe
from linattn.bench.measuring.results import Results
from linattn.bench.report.regressions import find_wrong
from linattn.bench.suite import targets

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

QUICK_BUDGET_S, QUICK_LIMIT_S = 0.4, 0.6
BUDGET_S, LIMIT_S = 3.0, 4.0


class BenchmarkPlugin:
    """One benchmark session: measures problems, keeps the measurements, and reports them.

    Args:
        folder: where results.json and results.csv go.
        quick: shorter sequences and fewer repeats.
    """

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.quick = quick
        self.folder = folder
        self.notes: list[str] = []
        """Lines for the end of the session, of benchmarks with a file of their own."""
        self.path = folder / "results.json"
        self._device = pick_device(None)
        self._memory = MemoryProbe(self._device)
        settings: dict[str, object] = {"plan": "quick" if quick else "default", "peak_memory": self._memory.how}
        self._results = Results("benchmark", describe(self._device), settings)

    @pytest.fixture(scope="session")
    def benchmarks(self) -> BenchmarkPlugin:
        """Give benchmarks the session's recorder."""
        return self

    def check(self, problem: Problem, methods: Sequence[Method]) -> None:
        """Measure every method on one problem, side by side with SDPA, and assert that what was timed is right."""
        budget, limit = (QUICK_BUDGET_S, QUICK_LIMIT_S) if self.quick else (BUDGET_S, LIMIT_S)
        kept, skipped = select_affordable([SDPA, *methods], problem, self._results.measurements, limit)
        measurements = measure(problem, kept, device=self._device, budget_s=budget, memory=self._memory) + skipped
        self._results.measurements += measurements
        self._results.save(self.path)
        flags = [str(flag) for measurement in measurements for flag in find_wrong(measurement)]
        assert not flags, "; ".join(flags)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table by case, N* of each head size, and where the results are."""
        for note in self.notes:
            terminalreporter.write_line(note)
        if not self._results.measurements:
            return
        environment = self._results.environment
        terminalreporter.section("linattn benchmarks")
        terminalreporter.write_line(f"{environment.device}, {environment.threads} threads, torch {environment.torch}")
        terminalreporter.write_line(f"peak MiB: {self._memory.how}\n")
        terminalreporter.write_line(tables.report(self._results.measurements))
        reached = targets.table(self._results.measurements, targets.of_this_process())
        if reached:
            terminalreporter.write_line(f"\ntargets (P: a prototype reached it, G: a goal, 1: one head)\n{reached}")
        terminalreporter.write_line(f"\nwritten: {self.path}, {self.path.with_suffix('.csv')}")

    def pytest_unconfigure(self) -> None:
        """End the process that measures memory."""
        self._memory.close()
