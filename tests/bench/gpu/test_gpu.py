"""`make gpu` without a GPU: which stages run, what rows and goals say; a rehearsal leaves no results behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from linattn.bench.gpu import cases, command
from linattn.bench.gpu.cases import CHUNKED, DIRECT, FLASH, Comparison, Goal, value_of
from linattn.bench.gpu.measurements import MachineLimits, compare, failures_of_ours, judge_goals, rates, verdict
from linattn.bench.gpu.stages import DONE, Record, Stage
from linattn.bench.gpu.tasks import Outcomes
from linattn.bench.measuring.cases import QUADRATIC_DIRECT, SDPA, Method, Problem
from linattn.bench.peers import implementations

CPU = torch.device("cpu")
LIMITS = MachineLimits(copy_gb_s=100.0, matmul_tflops=1.0)
PROBLEM = Problem(40, 8, 8, H=2, is_causal=True, direction="training")


def test_every_stage_has_its_function() -> None:
    assert [stage.name for stage in command.STAGES] == list(command.RUNS)


def _stages_run(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    started: list[str] = []

    def run_stages(stages, command_of, record, **rest):
        started.extend(stage.name for stage in stages)
        assert all(command_of(stage)[1].endswith("command.py") for stage in stages)
        return ["direct"] if "direct" in started else []

    monkeypatch.setattr(command, "run_stages", run_stages)
    monkeypatch.setattr(command, "prepare_environment", lambda rehearse: None)
    status = command.main(["--rehearse", *words])
    assert status == (1 if "direct" in started else 0)
    return started


def test_only_runs_what_is_named_and_missing_leaves_out_what_is_done(monkeypatch, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    assert _stages_run(monkeypatch, *out) == list(command.RUNS)
    assert _stages_run(monkeypatch, "--only", "limits,decode", *out) == ["limits", "decode"]
    Record(tmp_path / "gpu.json").put("stages", "limits", {"state": DONE})
    Record(tmp_path / "gpu.json").put("stages", "decode", {"state": "cut off after 30 s"})
    assert _stages_run(monkeypatch, "--only", "limits,decode", "--missing", *out) == ["decode"]
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--only", "decoding"])


def test_a_stage_runs_in_its_own_process_and_writes_to_the_folder_alone(monkeypatch, tmp_path: Path) -> None:
    """The real thing, for the cheapest stage."""
    results = Path(command.ROOT) / "bench" / "results"
    before = set(results.rglob("*"))
    monkeypatch.setattr(command, "STAGES", (Stage("limits", "the limits", 120),))
    monkeypatch.setattr(command, "PEERS", tmp_path / "no peers")
    for name in ("PYTHONPATH", "PYTHONUNBUFFERED", "TRITON_INTERPRET"):  # prepare_environment sets them; put back after
        monkeypatch.setenv(name, "")
    assert command.main(["--rehearse", "--only", "limits", "--out", str(tmp_path)]) == 0
    found = Record(tmp_path / "gpu.json").load()
    assert found["stages"]["limits"]["state"] == DONE
    assert found["limits"]["cpu"]["copy_gb_s"] > 0
    assert set(results.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main([]) == 2
    assert "REHEARSE=1" in capsys.readouterr().err
    assert command.main(["--stage", "figures", "--out", str(tmp_path)]) == 0


def test_outcomes_of_tests_are_recorded_as_they_come(tmp_path: Path) -> None:
    """A stage that is cut off leaves what it has seen."""
    record = Record(tmp_path / "gpu.json")
    outcomes = Outcomes(record)
    for name, when, outcome in (
        ("a", "setup", "passed"),
        ("a", "call", "passed"),
        ("a", "teardown", "passed"),
        ("b", "setup", "skipped"),
        ("c", "call", "failed"),
        ("d", "setup", "failed"),
    ):
        outcomes.written -= 10.0
        outcomes.pytest_runtest_logreport(
            pytest.TestReport(name, (name, 0, name), {}, outcome, "boom" if outcome == "failed" else None, when)
        )
    found = record.section("tests")["kernels"]
    assert (found["passed"], found["skipped"], found["failed"]) == (1, 1, 2)
    assert found["failures"] == ["c: boom", "d: boom"]


def test_a_row_says_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(q, k, v, is_causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal) * 1.1

    def breaks(q, k, v, is_causal):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(implementations.PEERS, "off", implementations.Peer("softmax", lambda: off))
    monkeypatch.setitem(implementations.PEERS, "breaks", implementations.Peer("softmax", lambda: breaks))
    wrong, broke = (Method(name, "softmax", "direct", name) for name in ("off", "breaks"))
    refused = Method("refused", "quadratic", "direct", "none such")
    methods = (QUADRATIC_DIRECT, SDPA, wrong, broke, refused)
    goals = (Goal(QUADRATIC_DIRECT, "speedup", 1.0, rivals=(SDPA, wrong)), Goal(QUADRATIC_DIRECT, "ms", 1e9))
    comparison = Comparison(PROBLEM, methods, goals)
    rows = compare(comparison, CPU, LIMITS)
    assert rows["quadratic direct"]["error"] < 1e-5
    assert rows["quadratic direct"]["gradient_error"] < 5e-5
    assert rows["off"]["error"] == pytest.approx(0.1, rel=0.01)
    assert rows["breaks"]["failed"] == "RuntimeError: no kernel"
    assert "none such" in rows["refused"]["skipped"]
    speed, ms = judge_goals(comparison, rows).values()
    # The wrong peer does not count, however fast.
    assert speed["measured"] == pytest.approx(rows["SDPA"]["ms"] / rows["quadratic direct"]["ms"])
    assert ms["met"] is True


def test_a_failure_of_ours_fails_the_stage_and_that_of_a_peer_does_not() -> None:
    ours, theirs = {"method": {"backend": "triton"}}, {"method": {"backend": "flex"}}
    assert failures_of_ours([{**ours, "failed": "boom"}, {**theirs, "failed": "x"}, {**ours, "skipped": "y"}]) == [
        "boom"
    ]


def test_goals_are_judged_in_their_own_direction() -> None:
    rows = {DIRECT.name: {"ms": 2.0, "TFLOP/s": 500.0}, FLASH.name: {"ms": 3.0}}
    assert value_of(Goal(DIRECT, "speedup", 1.0, rivals=(FLASH,)), rows, [FLASH.name]) == 1.5
    assert value_of(Goal(DIRECT, "speedup", 1.0, rivals=(FLASH,)), rows, []) is None
    assert value_of(Goal(CHUNKED, "ms", 1.0), rows, []) is None
    assert verdict(Goal(DIRECT, "TFLOP/s", 560.0), 500.0)["met"] is False
    assert verdict(Goal(DIRECT, "ms", 4.2), 2.0)["met"] is True
    assert verdict(Goal(DIRECT, "ms", 4.2), None)["met"] is None


def test_limits_are_those_of_the_design() -> None:
    """0.46 ms forward at 790 TFLOP/s for 8 heads of 64 over 65536 tokens, in chunks of 1024: matrix products bind."""
    problem = Problem(65536, 64, 64, 1, 8, "bf16", is_causal=True)
    found = rates(CHUNKED, problem, 1.0, MachineLimits(4300.0, 790.0))
    assert found["limit_ms"] == pytest.approx(0.46, rel=0.02)
    assert found["bound"] == "matrix products"
    # Direct: 2 N (D + M) flops a token and head, halved by causality.
    direct = rates(DIRECT, Problem(16384, 128, 128, 1, 16, "bf16", is_causal=True), 1.0, MachineLimits(4300.0, 790.0))
    assert direct["TFLOP/s"] == pytest.approx(16 * 16384**2 * 256 / 1e9, rel=1e-3)
    # A feature map at D = 128 is bound by bandwidth: q, k, v and out once, in bf16.
    elu = rates(cases.ELU, Problem(8192, 128, 128, 1, 96, "bf16", is_causal=True), 1.0, MachineLimits(4300.0, 790.0))
    assert elu["bound"] == "bandwidth"
    assert elu["GB/s"] == pytest.approx(4 * 96 * 8192 * 128 * 2 / 1e6)


def test_every_goal_is_decided_by_a_row_of_its_own_comparison() -> None:
    tables = ("DIRECT_CASES", "CHUNKED_CASES", "FEATURE_MAP_CASES", "FLEX_CASES", "PEER_CASES", "FLA_CASES")
    for comparison in (c for table in tables for c in getattr(cases, table)):
        for goal in comparison.goals:
            assert {goal.method, *goal.rivals} <= set(comparison.methods), f"{comparison.problem}: {goal}"


def test_figures_are_drawn_from_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from linattn.bench.gpu.plots import draw_all

    record = Record(tmp_path / "gpu.json")
    assert draw_all(record, tmp_path) == []
    record.put("goals", "a", verdict(Goal(DIRECT, "ms", 4.2), 2.0))
    record.put(
        "crossover", "D64", {"text": "N* = 100", "ms": {n: {"64": 1.0} for n in ("chunked", "direct", "softmax")}}
    )
    assert [path.name for path in draw_all(record, tmp_path)] == ["goals.png", "crossover.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))


def test_module_is_run_by_its_file() -> None:
    """As the stages do it: without the package installed or on the path."""
    import subprocess

    done = subprocess.run(
        [sys.executable, str(command.__file__), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--rehearse" in done.stdout
