"""Recurrent layers beside torch.nn on the CPU: run by `pytest --benchmark`, which writes rnn.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from linattn.bench.measuring.environment import describe
from linattn.bench.suite import rnn_cases
from linattn.bench.suite.rnn_cases import CASES, RecurrentCase, RecurrentTiming
from linattn.testing import BUDGETS

if TYPE_CHECKING:
    from linattn.bench.suite.pytest_plugin import BenchmarkPlugin

BUDGET_S, QUICK_BUDGET_S = 3.0, 1.0


@pytest.fixture(scope="module")
def results() -> list[RecurrentTiming]:
    """Collect the results of this session."""
    return []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the cases: with `--benchmark-quick` only the cases with a goal."""
    quick = metafunc.config.getoption("--benchmark-quick")
    cases = [case for case in CASES if case.goal is not None or not quick]
    metafunc.parametrize("case", cases, ids=map(str, cases))


def test_recurrent_layers(case: RecurrentCase, results: list[RecurrentTiming], benchmarks: BenchmarkPlugin) -> None:
    """Measure one layer beside torch.nn, and check its outputs and gradients."""
    result = rnn_cases.measure(case, QUICK_BUDGET_S if benchmarks.quick else BUDGET_S)
    results.append(result)
    rnn_cases.save(benchmarks.folder / "rnn.json", results, describe(torch.device("cpu")))
    benchmarks.notes.append(str(result))
    assert result.error <= BUDGETS[torch.float32].gradient
