"""`linattn scaling` end to end on tiny sizes: every operation where it is defined, right, with its exponents."""

from __future__ import annotations

import pytest

from linattn._util.environment import pick_device
from linattn.bench.crossover import sweep
from linattn.bench.crossover.sweep import SweepPlan
from linattn.bench.machine import scaling
from linattn.bench.measuring import memory, timing
from linattn.bench.measuring.cases import ARGMAX, KERNEL_ATTENTION, Problem, supports
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.results import Measurement, Results
from linattn.cli.main import main


def test_every_operation_is_measured_where_it_is_defined_and_right(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scaling, "QUICK", SweepPlan("quick", 32, 64, 0.0, 9.0, 9.0, refine=False))
    # Peaks have tests of their own, and take a process each.
    monkeypatch.setattr(memory, "_can_measure_cpu", lambda: False)
    monkeypatch.setattr(timing, "WARM_UP_MS", 0.0)
    options = ["--quick", "--head-size", "8", "--heads", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["scaling", *options]) == 0
    measurements = Results.load(tmp_path / "results.json").measurements
    for causal, direction in scaling.SERIES:
        wanted = [m for m in scaling.METHODS if supports(m, Problem(32, 8, 8, is_causal=causal, direction=direction))]
        for N in (32, 64):
            problem = Problem(N, 8, 8, H=1, is_causal=causal, direction=direction)
            assert [measurement.method for measurement in measurements if measurement.problem == problem] == wanted
    assert {measurement.method for measurement in measurements} == set(scaling.METHODS)
    assert all(max(measurement.error, measurement.gradient_error or 0.0) < 1e-5 for measurement in measurements)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert "argmax_attention" in capsys.readouterr().out


def test_where_operations_are_defined() -> None:
    recurrent = next(m for m in scaling.METHODS if m.form == "recurrent")
    assert supports(recurrent, Problem(8, 4, 4, is_causal=True))
    assert not supports(recurrent, Problem(8, 4, 4))
    assert supports(ARGMAX, Problem(8, 4, 4))
    assert not supports(ARGMAX, Problem(8, 4, 4, is_causal=True))
    assert not supports(ARGMAX, Problem(8, 4, 4, direction="training"))
    assert supports(KERNEL_ATTENTION, Problem(8, 4, 4, is_causal=True, direction="training"))


@pytest.fixture
def modelled(tmp_path, monkeypatch) -> Results:
    """A whole run in which direct forms take N^2 and the others N, memory always N."""

    def measure(problem, methods, **options):
        ms = {m: problem.N ** (2 if m.form == "direct" else 1) / 1e4 for m in methods}
        return [
            Measurement(m, problem, "x", [ms[m]] * 3, ms[m], ms[m] * 0.99, ms[m] * 1.01, peak_mib=problem.N / 64)
            for m in methods
        ]

    monkeypatch.setattr(sweep, "measure", measure)
    assert main(["scaling", "--quick", "--device", "cpu", "--no-figures", "--out", str(tmp_path)]) == 0
    return Results.load(tmp_path / "results.json")


def test_the_table_gives_the_exponents(modelled: Results) -> None:
    lines = scaling.table(modelled.measurements)
    assert len(lines) == 7 + 8 + 8
    for group, method, longest, time, flops, peak in lines:
        expected = 2 if "direct" in method or "attention" in method or method == "SDPA" else 1
        assert time.startswith(f"{expected}.00 ["), (group, method)
        assert float(flops) == pytest.approx(expected, abs=0.01), (group, method)
        assert peak.startswith("1.00 [")
        # Direct calls of 4096 tokens would have taken longer than the plan waits for.
        assert longest == ("4096" if expected == 1 else "2048")


def test_the_figure_tells_every_exponent(modelled: Results) -> None:
    figure = scaling.draw(modelled)
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert "quadratic chunked (1.00)" in labels[0]
    assert "SDPA (2.00)" in labels[0]
    assert all(label.endswith("(1.00)") for label in labels[3])
    assert describe(pick_device("cpu")).device in figure.texts[-1].get_text()
