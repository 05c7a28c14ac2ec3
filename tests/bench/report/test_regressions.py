"""Flag an injected slow-down, a larger peak and a wrong output, but neither noise nor a slower machine."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
from pathlib import Path

import pytest
import torch

from linattn.bench.measuring import timing
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method, Problem
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.measure import measure
from linattn.bench.measuring.results import Measurement, Results
from linattn.bench.measuring.timing import summarise
from linattn.bench.peers import implementations
from linattn.bench.report.regressions import compare, load_committed, log_slowdown
from linattn.cli.main import main

CPU = torch.device("cpu")
MS = {SDPA: 10.0, QUADRATIC_DIRECT: 7.0, QUADRATIC_CHUNKED: 3.0}


def results(*, seed: int, noise: float = 0.03, factor: dict[Method, float] | None = None, **fields) -> Results:
    """Three lengths, 15 rounds; `factor` slows methods down, `fields` replace what rows say."""
    generator, measurements = random.Random(seed), []
    for N in (1024, 2048, 4096):
        weather = [generator.lognormvariate(0, 0.3) for _ in range(15)]
        for method, ms in MS.items():
            slow = (factor or {}).get(method, 1.0)
            samples = [ms * slow * w * generator.lognormvariate(0, noise) for w in weather]
            band = summarise(samples)
            measurements.append(
                Measurement(
                    method, Problem(N, 64, 64), "x", samples, band.median, band.p20, band.p80, error=1e-7, peak_mib=8.0
                )
            )
    measurements = [dataclasses.replace(measurement, **fields) for measurement in measurements]
    return Results("crossover", describe(CPU), {"plan": "quick"}, measurements)


@pytest.mark.parametrize("seed", range(8))
def test_two_runs_of_the_same_code_are_not_flagged(seed: int) -> None:
    assert compare(results(seed=seed), results(seed=100 + seed)) == []


@pytest.mark.parametrize("slow", [1.3, 2.0])
@pytest.mark.parametrize("method", [QUADRATIC_DIRECT, QUADRATIC_CHUNKED])
def test_an_injected_slow_down_is_flagged_and_nothing_else(method: Method, slow: float) -> None:
    flags = compare(results(seed=1, factor={method: slow}), results(seed=2))
    assert [(flag.kind, flag.method) for flag in flags] == [("slower", method.name)] * 3
    assert "times the time it took as measured by SDPA in the same run" in str(flags[0])


def test_a_slower_machine_accuses_nobody() -> None:
    assert compare(results(seed=1, factor=dict.fromkeys(MS, 3.0)), results(seed=2)) == []


def test_without_sdpa_milliseconds_are_compared() -> None:
    now, before = (results(seed=seed, factor={QUADRATIC_DIRECT: f}) for seed, f in ((1, 2.0), (2, 1.0)))
    for run in (now, before):
        run.measurements[:] = [measurement for measurement in run.measurements if measurement.method != SDPA]
    assert {flag.method for flag in compare(now, before)} == {"quadratic direct"}


def test_the_band_follows_the_noise() -> None:
    def band(noise: float) -> float:
        now, before = results(seed=1, noise=noise), results(seed=2, noise=noise)
        return log_slowdown(now.measurements[1], before.measurements[1], now.measurements[0], before.measurements[0])[1]

    assert 0.09 < band(0.001) < 0.11 < band(0.05) < band(0.3)


def test_a_larger_peak_is_flagged() -> None:
    flags = compare(results(seed=1, peak_mib=12.0), results(seed=2))
    assert {flag.kind for flag in flags} == {"larger"}
    assert "8.0 MiB before, 12.0 MiB now" in str(flags[0])
    assert compare(results(seed=1, peak_mib=9.9), results(seed=2)) == []


def test_peaks_measured_in_different_ways_are_not_compared() -> None:
    now = results(seed=1, peak_mib=12.0)
    now.settings["peak_memory"] = "another way"
    assert compare(now, results(seed=2)) == []


def test_what_is_no_longer_measured_is_flagged() -> None:
    gone = {"median_ms": None, "samples_ms": [], "skipped": "about 9 s a call"}
    assert compare(results(seed=1, **gone), results(seed=2, **gone)) == []
    flags = compare(results(seed=1, **gone), results(seed=2))
    assert {flag.kind for flag in flags} == {"not measured"}
    assert "now: about 9 s a call" in str(flags[0])


@pytest.mark.parametrize(("field", "value"), [("error", 2e-5), ("error", float("nan")), ("gradient_error", 1e-3)])
def test_an_error_beyond_its_budget_is_flagged_without_a_baseline(field: str, value: float) -> None:
    flags = compare(results(seed=1, **{field: value}), None)
    assert len(flags) == 9
    assert {flag.kind for flag in flags} == {"wrong"}
    assert "accepted: 1e-05" in str(flags[0]) or "accepted: 5e-05" in str(flags[0])


def test_a_wrong_output_is_caught_when_it_is_measured(monkeypatch, tmp_path, capsys) -> None:
    def off(q, k, v, is_causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal) * 1.0001

    monkeypatch.setitem(implementations.PEERS, "off", implementations.Peer("softmax", lambda: off))
    monkeypatch.setattr(timing, "WARM_UP_MS", 0.0)
    measurements = measure(
        Problem(64, 8, 8, H=1), [SDPA, Method("off", "softmax", "direct", "off")], device=CPU, budget_s=0.0
    )
    measured = Results("crossover", describe(CPU), {"plan": "quick"}, measurements)
    assert [(flag.kind, flag.method) for flag in compare(measured, None)] == [("wrong", "off")]
    measured.save(tmp_path / "results.json")
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "--out", str(page), "--no-figures"]) == 1
    assert "wrong: off on D8-N64" in capsys.readouterr().out
    assert "output is off by 1.0e-04, accepted: 1e-05" in page.read_text()


def test_the_report_flags_a_slow_down_against_a_baseline(tmp_path: Path, capsys) -> None:
    results(seed=2).save(tmp_path / "before.json")
    for slow, status in ((1.0, 0), (1.5, 1)):
        results(seed=1, factor={QUADRATIC_DIRECT: slow}).save(tmp_path / "now" / "results.json")
        options = ["--baseline", str(tmp_path / "before.json"), "--out", str(tmp_path / "page.html"), "--no-figures"]
        assert main(["report", str(tmp_path / "now"), *options]) == status
        assert ("slower: quadratic direct" in capsys.readouterr().out) is (status == 1)
        assert ("slower: quadratic direct" in (tmp_path / "page.html").read_text()) is (status == 1)


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True)


def test_the_last_committed_results_are_the_baseline(tmp_path: Path) -> None:
    slug = describe(CPU).slug
    path = tmp_path / "bench" / "results" / slug / "results.json"
    git(tmp_path, "init", "-q")
    runs = [results(seed=seed) for seed in range(4)]
    for run in runs[:2]:
        run.save(path)
        git(tmp_path, "add", "-A")
        git(tmp_path, "commit", "-qm", "results")
    # The file as committed: the version before it.
    assert load_committed(path, Results.load(path))[0] == runs[0]
    # The file with a change: the committed version.
    runs[2].save(path)
    assert load_committed(path, runs[2])[0] == runs[1]
    # A file that git does not know: the committed one of the same device and kind.
    elsewhere = tmp_path / "runs" / "results.json"
    runs[3].save(elsewhere)
    found, source = load_committed(elsewhere, runs[3])
    assert found == runs[1]
    assert source.startswith(f"bench/results/{slug}/results.json at HEAD")
    assert load_committed(elsewhere, dataclasses.replace(runs[3], kind="scaling")) is None


def test_without_git_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    results(seed=1).save(tmp_path / "results.json")
    assert load_committed(tmp_path / "results.json", results(seed=1)) is None


def test_results_of_another_kind_in_the_history_are_passed_over(tmp_path: Path) -> None:
    slug = describe(CPU).slug
    folder = tmp_path / "bench" / "results" / slug
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "results.json").write_text(json.dumps({"loss": 1.0}))
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "results")
    (tmp_path / "runs").mkdir()
    assert load_committed(tmp_path / "runs" / "results.json", results(seed=1)) is None
