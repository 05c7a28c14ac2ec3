"""The table of speed targets: what counts as reached, and that every target can be measured."""

from __future__ import annotations

import pytest
import torch

from linattn.bench.measuring.cases import QUADRATIC_DIRECT, SDPA, Method, Problem, attention_of
from linattn.bench.measuring.results import Measurement
from linattn.bench.suite import targets

PROBLEM = Problem(4096, 64, 64, is_causal=True)


def measurement(method: Method, ms: float, problem: Problem = PROBLEM) -> Measurement:
    return Measurement(method, problem, samples_ms=[ms], median_ms=ms)


def test_a_target_is_a_ratio_of_times_on_one_problem() -> None:
    target = targets.Target(QUADRATIC_DIRECT, PROBLEM, 1.4, "P")
    elsewhere = Problem(4096, 64, 64, is_causal=False)
    measurements = [measurement(SDPA, 30.0), measurement(QUADRATIC_DIRECT, 20.0), measurement(SDPA, 300.0, elsewhere)]
    assert target.reached(measurements) == pytest.approx(1.5)
    assert "1.50x" in targets.table(measurements, [target])
    assert "reached" in targets.table(measurements, [target])
    slower = [measurement(SDPA, 30.0), measurement(QUADRATIC_DIRECT, 30.0)]
    assert "short by 29 %" in targets.table(slower, [target])


def test_what_was_not_measured_is_not_in_the_table() -> None:
    assert targets.table([measurement(QUADRATIC_DIRECT, 20.0)], targets.TARGETS) == ""
    assert targets.table([], targets.TARGETS) == ""


def test_the_targets_follow_the_instruction_set_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert targets.of_this_process() == targets.AVX2_TARGETS
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert targets.of_this_process() == targets.TARGETS


def test_every_target_names_methods_that_exist() -> None:
    for target in (*targets.TARGETS, *targets.AVX2_TARGETS):
        assert callable(attention_of(target.method))
        assert target.method in targets.methods_on(target.problem, targets.TARGETS + targets.AVX2_TARGETS)
        assert target.goal > 0
        assert target.kind in "PG1"
