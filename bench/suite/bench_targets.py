"""The cases of bench/suite/targets.py: run by `pytest --benchmark`, which prints what was reached beside the goals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.bench.suite.targets import Target, methods_on, of_this_process

if TYPE_CHECKING:
    import pytest

    from linattn.bench.measuring.cases import Problem
    from linattn.bench.suite.pytest_plugin import BenchmarkPlugin


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test a problem; with `--benchmark-quick` only problems of up to 4096 tokens."""
    targets = of_this_process()
    longest = 4096 if metafunc.config.getoption("--benchmark-quick") else 1 << 30
    problems = list(dict.fromkeys(t.problem for t in targets if longest >= t.problem.N))
    metafunc.parametrize(("problem", "targets"), [(p, targets) for p in problems], ids=map(str, problems))


def test_targets(problem: Problem, targets: tuple[Target, ...], benchmarks: BenchmarkPlugin) -> None:
    """Measure every method that a target on this problem compares."""
    benchmarks.check(problem, methods_on(problem, targets))
