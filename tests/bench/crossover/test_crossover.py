"""The main job end to end on tiny sizes: files, figures, resuming, and the two ways to start it."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from linattn._util.environment import pick_device
from linattn.bench.crossover import command, figures, sweep, tables, winner_map
from linattn.bench.crossover.sweep import SweepPlan
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method, Problem
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.results import Measurement, Results
from linattn.cli.main import main
from linattn.errors import ArgumentError, MissingExtraError

ROOT = Path(__file__).resolve().parents[3]
TINY = ["crossover", "--quick", "--sizes", "4", "--longest", "256", "--heads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch) -> None:
    plan = SweepPlan("quick", 128, 256, budget_s=0.0, limit_s=9.0, settled_s=9.0, refine=False)
    monkeypatch.setattr(command, "QUICK", plan)


def test_run_writes_tables_results_and_figures(tmp_path, capsys) -> None:
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "memory.png",
        "nstar.png",
        "results.csv",
        "results.json",
        "time.png",
        "winner.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
    results = Results.load(tmp_path / "results.json")
    wanted = [(D, causal, N, m) for D in (4,) for causal in (False, True) for N in (128, 256) for m in command.METHODS]
    assert [(r.problem.D, r.problem.is_causal, r.problem.N, r.method) for r in results.measurements] == wanted
    assert all(measurement.error < 1e-5 and measurement.peak_mib is not None for measurement in results.measurements)
    assert "4 problems on cpu-" in output.err
    assert "D=4 non-causal fp32: N*" in output.out
    assert output.out.rstrip().endswith("winner.png")


def test_rerun_measures_only_what_is_missing(tmp_path, monkeypatch) -> None:
    measured = []

    def recorded(problem, methods, **options):
        measured.append(problem.N)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return [Measurement(m, problem, "x", [1.0], 1.0, 1.0, 1.0) for m in methods]

    monkeypatch.setattr(sweep, "measure", recorded)
    arguments = [*TINY, "--out", str(tmp_path), "--no-figures"]
    assert main(arguments) == 130
    assert len(Results.load(tmp_path / "results.json").measurements) == 2 * len(command.METHODS)
    assert main(arguments) == 0
    assert measured == [128, 256, 128, 128, 256]
    assert main(arguments) == 0
    assert len(measured) == 5
    assert main([*arguments, "--fresh"]) == 0
    assert len(measured) == 9


def test_refinement_is_measured_once(tmp_path, monkeypatch) -> None:
    plan = SweepPlan("quick", 128, 8192, budget_s=0.0, limit_s=9.0, settled_s=9.0, refine=True)
    monkeypatch.setattr(command, "QUICK", plan)
    measured = []

    def power_laws(problem, methods, **options):
        measured.append(problem.N)
        times = {SDPA: problem.N**2, QUADRATIC_DIRECT: 2 * problem.N**2, QUADRATIC_CHUNKED: 1500 * problem.N}
        return [Measurement(m, problem, "x", [times[m] / 1e6] * 3, times[m] / 1e6, 0.0, 1.0) for m in methods]

    monkeypatch.setattr(sweep, "measure", power_laws)
    arguments = ["crossover", "--quick", "--sizes", "4", "--out", str(tmp_path), "--no-figures", "--device", "cpu"]
    assert main(arguments) == 0
    # Middles beside 1500 (against SDPA), then beside 750 (against the direct form), for each mask.
    assert measured[:12] == [*[128, 256, 512, 1024, 2048, 4096, 8192, 720, 1456, 2896, 368, 720][:11], 128]
    count = len(measured)
    assert main(arguments) == 0
    assert len(measured) == count


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--longest", "128"], "--longest got 128"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cuda:99"], "cuda"),
        (["--threads", "0"], "--threads got 0"),
        (["--heads", "0"], "--heads got 0; accepted: integers of at least 1"),
    ],
)
def test_bad_options_are_one_line(extra, message, tmp_path, capsys) -> None:
    assert main([*TINY, "--no-figures", "--out", str(tmp_path), *extra]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_unwritable_folder_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--no-figures", "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"linattn\[bench\]"):
        figures.require_matplotlib()
    assert main([*TINY, "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_runs_as_a_script_from_anywhere(tmp_path) -> None:
    script = ROOT / "bench" / "crossover" / "command.py"
    found = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "--quick" in found.stdout


def measurements_of(D: int, times) -> list[Measurement]:
    measurements = []
    for N in (64, 128, 256, 512, 1024):
        for method, time in times.items():
            ms = time(N)
            measurements.append(
                Measurement(method, Problem(N, D, D), "x", [ms] * 3, ms, ms, ms, error=1e-7, judged_rows=N)
            )
    return measurements


def test_last_line_of_a_head_size_states_n_star_beside_theory() -> None:
    measurements = measurements_of(
        16, {SDPA: lambda N: N * N, QUADRATIC_DIRECT: lambda N: 2 * N * N, QUADRATIC_CHUNKED: lambda N: 300 * N}
    )
    last = tables.report(measurements).splitlines()[-2:]
    assert last == [
        "D=16 non-causal fp32: N* = 150 [150, 150] against our direct form, N*/D^2 = 0.59",
        "D=16 non-causal fp32: N* = 300 [300, 300] against SDPA, N*/D^2 = 1.17, theory N* = 153 by flops, 256 by D^2",
    ]


def test_markers_are_hollow_where_not_bracketed(tmp_path) -> None:
    def markers(chunked) -> list[tuple[str, bool]]:
        measurements = measurements_of(
            16, {SDPA: lambda N: N * N, QUADRATIC_DIRECT: lambda N: N * N / 2, QUADRATIC_CHUNKED: chunked}
        )
        groups = tables.grouped(measurements)
        environment = describe(pick_device("cpu"))
        (axes,) = figures.draw_time(groups, environment).axes
        return [
            (line.get_marker(), line.get_markerfacecolor() != "white")
            for line in axes.lines
            if line.get_marker() in ("o", "D") and len(line.get_xdata()) == 1
        ]

    assert markers(lambda N: 140 * N) == [("o", True), ("D", True)]
    assert markers(lambda N: 300 * N) == [("o", True), ("D", False)]
    assert markers(lambda N: 3000 * N) == []


def power_rows(*, heads: int = 1) -> list[Measurement]:
    times = {SDPA: lambda N: N * N, QUADRATIC_DIRECT: lambda N: 2 * N * N, QUADRATIC_CHUNKED: lambda N: 300 * N}
    return [
        dataclasses.replace(measurement, problem=dataclasses.replace(measurement.problem, H=heads))
        for measurement in measurements_of(16, times)
    ]


def test_figures_have_short_names_unless_there_are_several(tmp_path) -> None:
    environment = describe(pick_device("cpu"))

    def names(measurements: list[Measurement]) -> list[str]:
        return [path.name for path in figures.draw_all(Results("crossover", environment, {}, measurements), tmp_path)]

    assert names(power_rows()) == ["time.png", "nstar.png"]
    assert names(power_rows() + power_rows(heads=2)) == [
        "time-fp32-forward-b1-h1.png",
        "nstar-fp32-forward-b1-h1.png",
        "time-fp32-forward-b1-h2.png",
        "nstar-fp32-forward-b1-h2.png",
    ]


def test_nothing_of_a_figure_with_one_head_size_is_cut_off() -> None:
    figure = figures.draw_time(tables.grouped(power_rows()), describe(pick_device("cpu")))
    figure.draw_without_rendering()
    for part in (*figure.legends, *figure.texts):
        box = part.get_window_extent()
        assert box.x0 >= 0, part
        assert box.x1 <= figure.bbox.x1, part


def test_a_size_below_one_is_named() -> None:
    with pytest.raises(ArgumentError, match="sizes got N=64, D=8, M=8, B=1, H=0; accepted"):
        Problem(64, 8, 8, H=0)


def modelled(monkeypatch, seconds) -> list[tuple[int, list[Method]]]:
    """Replace measuring by a model `seconds(method, N)`; returns what was measured, in order."""
    measured = []

    def measure(problem, methods, **options):
        measured.append((problem.N, list(methods)))
        ms = {m: 1e3 * seconds(m, problem.N) for m in methods}
        return [Measurement(m, problem, "x", [ms[m]] * 3, ms[m], ms[m], ms[m]) for m in methods]

    monkeypatch.setattr(sweep, "measure", measure)
    return measured


def test_long_calls_end_once_the_order_is_settled(tmp_path, monkeypatch) -> None:
    # Chunked wins from 1500 on; SDPA and direct take 0.1 s at 1024.
    times = {
        SDPA: lambda N: N * N / 1e7,
        QUADRATIC_DIRECT: lambda N: N * N / 1e7,
        QUADRATIC_CHUNKED: lambda N: N * 1.5e-4,
    }
    measured = modelled(monkeypatch, lambda method, N: times[method](N))
    plan = SweepPlan("quick", 128, 8192, budget_s=0.0, limit_s=9.0, settled_s=1.5, refine=True)
    monkeypatch.setattr(command, "QUICK", plan)
    arguments = ["crossover", "--quick", "--sizes", "4", "--out", str(tmp_path), "--no-figures", "--device", "cpu"]
    assert main(arguments) == 0
    first = measured[: len(measured) // 2]
    assert [N for N, methods in first if len(methods) == 3] == [128, 256, 512, 1024, 2048, 720, 1456, 2896]
    # Alone the linear form goes on to the end: its growth is wanted.
    assert [N for N, methods in first if methods == [QUADRATIC_CHUNKED]] == [4096, 8192]
    results = Results.load(tmp_path / "results.json")
    found = tables.crossing_of([r for r in results.measurements if not r.problem.is_causal], SDPA)
    assert found.value == pytest.approx(1500, rel=0.01)
    assert found.bracketed


def test_full_is_the_whole_sweep(tmp_path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(command, "run_sweep", lambda kind, groups, *args, **options: seen.extend(groups))
    monkeypatch.setattr(command, "summary", lambda results: "")
    assert main(["crossover", "--full", "--out", str(tmp_path), "--no-figures", "--device", "cpu"]) == 0
    heads = {(g[0].D, g[0].is_causal, g[0].dtype, g[0].direction) for g in seen}
    wanted = itertools.product((16, 32, 64, 128), (False, True), ("fp32", "bf16"), ("forward", "training"))
    assert heads == set(wanted)
    assert len(seen) == 32


def test_a_cell_belongs_to_the_fastest(tmp_path) -> None:
    measurements = power_rows()
    assert winner_map.factors(measurements, 64) == (SDPA, 2.0)
    method, factor = winner_map.factors(measurements, 1024)
    assert method == QUADRATIC_CHUNKED
    assert factor == pytest.approx(1024 / 300)
    assert winner_map.factors([measurement for measurement in measurements if measurement.method == SDPA], 64) is None
    (axes,) = winner_map.draw_winners(figures.parts_of(measurements), describe(pick_device("cpu"))).axes
    assert [text.get_text() for text in axes.texts] == ["2.0", "2.0", "1.2", "1.7", "3.4"]
    (square, features) = (line.get_ydata() for line in axes.lines)
    # Lines of the grid are octaves above 64; D = 16: D^2 = 256, C = 153.
    assert list(square) == [2.0]
    assert features[0] == pytest.approx(1.257, abs=1e-3)


def test_memory_has_a_figure_where_it_was_measured(tmp_path) -> None:
    measurements = [
        dataclasses.replace(measurement, peak_mib=measurement.problem.N / 16) for measurement in power_rows()
    ]
    written = figures.draw_all(Results("crossover", describe(pick_device("cpu")), {}, measurements), tmp_path)
    assert [path.name for path in written] == ["time.png", "memory.png", "nstar.png"]
