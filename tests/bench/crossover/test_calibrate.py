"""`linattn calibrate`: the search for the crossing, and the table it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linattn._dispatch import calibration
from linattn.bench.crossover import calibrate
from linattn.bench.measuring.cases import Problem
from linattn.cli.main import main


@pytest.mark.parametrize("crossing", [300, 1000, 3000])
def test_the_search_brackets_a_crossing_away_from_where_it_began(
    crossing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def timed(problem: Problem, backend: str, device: torch.device, budget_s: float, chunked, direct) -> None:  # type: ignore[no-untyped-def]
        measured.append(problem.N)
        chunked[problem.N], direct[problem.N] = [problem.N * crossing * 1e-6] * 3, [problem.N**2 * 1e-6] * 3

    monkeypatch.setattr(calibrate, "_measure", timed)
    found = calibrate.crossing_near(Problem(1000, 16, 16), "reference", torch.device("cpu"), 1.0)
    assert found is not None
    assert found.value == pytest.approx(crossing, rel=0.02)
    assert found.bracketed
    assert len(measured) == len(set(measured)) <= 10


def test_calls_too_long_to_wait_for_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def slow(problem: Problem, backend: str, device: torch.device, budget_s: float, chunked, direct) -> None:  # type: ignore[no-untyped-def]
        measured.append(problem.N)
        chunked[problem.N], direct[problem.N] = [9e9] * 3, [3000.0 * (problem.N / 1000) ** 2] * 3

    monkeypatch.setattr(calibrate, "_measure", slow)
    found = calibrate.crossing_near(Problem(1000, 16, 16), "reference", torch.device("cpu"), 1.0)
    assert found is not None
    assert found.value is None
    assert found.always == "slower"
    assert max(measured) < 1200


def test_the_command_adds_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    calibration.save(path, {"native/avx2/fp32": {"causal": {64: 3000.0}}})
    options = ["--backend", "reference", "--dtype", "fp32", "--sizes", "4", "--budget", "0.001", "--device", "cpu"]
    assert main(["calibrate", *options, "--out", str(path)]) == 0
    table = calibration.load(path)
    assert table["native/avx2/fp32"] == {"causal": {64: 3000.0}}
    told = capsys.readouterr().out
    assert told.count("reference/cpu/fp32 D=4") == 2
