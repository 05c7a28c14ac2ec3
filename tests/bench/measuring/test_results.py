"""Result files: whole or not written at all, continued only by what may stand beside them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import re

import pytest
import torch

from linattn._util.environment import device_slug
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, SDPA, Problem
from linattn.bench.measuring.environment import describe, measured_sources
from linattn.bench.measuring.results import Measurement, Results, resume
from linattn.errors import DataError

PROBLEM = Problem(64, 8, 8)


@pytest.fixture
def environment():
    return describe(torch.device("cpu"))


@pytest.fixture
def results(environment) -> Results:
    measured = Measurement(SDPA, PROBLEM, "sdpa", [1.0, 2.0, 3.0], 2.0, 1.4, 2.6, 1.0, 0.5, 1e-7, None, 64, 3.5)
    skipped = Measurement(QUADRATIC_CHUNKED, PROBLEM, skipped="about 9 s a call")
    return Results("crossover", environment, {"plan": "quick"}, [measured, skipped])


def test_what_is_saved_is_loaded(results: Results, tmp_path) -> None:
    path = tmp_path / "new" / "results.json"
    results.save(path)
    assert Results.load(path) == results
    assert sorted(file.name for file in path.parent.iterdir()) == ["results.csv", "results.json"]


def test_csv_has_one_line_a_row(results: Results, tmp_path) -> None:
    results.save(tmp_path / "results.json")
    with pathlib.Path(tmp_path / "results.csv").open(newline="") as file:
        measurements = list(csv.DictReader(file))
    assert [measurement["method"] for measurement in measurements] == ["SDPA", "quadratic chunked"]
    assert (
        measurements[0]["N"],
        measurements[0]["median_ms"],
        measurements[0]["rounds"],
        measurements[0]["gflops_per_s"],
    ) == ("64", "2", "3", "250")
    assert (measurements[1]["median_ms"], measurements[1]["skipped"]) == ("", "about 9 s a call")


def test_failed_write_leaves_the_earlier_file_and_no_litter(results: Results, tmp_path, monkeypatch) -> None:
    path = tmp_path / "results.json"
    results.save(path)
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    results.measurements.clear()
    with pytest.raises(DataError, match="No space left"):
        results.save(path)
    assert path.read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.csv", "results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "cannot read"),
        ("[]", "schema None"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1}', "damaged: 'rows'"),
    ],
)
def test_unreadable_files_are_named(text: str, message: str, tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(message)):
        Results.load(path)
    with pytest.raises(DataError, match="cannot read"):
        Results.load(tmp_path / "absent.json")


def test_resume_continues_what_the_same_code_measured_here(results: Results, environment, tmp_path) -> None:
    path = tmp_path / "results.json"
    results.save(path)
    later = dataclasses.replace(environment, date="2100-01-01T00:00:00+00:00", commit="another", load_average=9.0)
    found, aside = resume(path, "crossover", later, {"plan": "quick"})
    assert aside is None
    assert found.measurements == results.measurements


@pytest.mark.parametrize("change", [{"sources": "other"}, {"threads": 77}, {"torch": "1.0"}, {"device": "abacus"}])
def test_resume_never_mixes_and_never_loses(change, results: Results, environment, tmp_path) -> None:
    path = tmp_path / "results.json"
    results.save(path)
    found, aside = resume(path, "crossover", dataclasses.replace(environment, **change), {"plan": "quick"})
    assert found.measurements == []
    assert "results.previous.json" in aside
    assert Results.load(tmp_path / "results.previous.json").measurements == results.measurements


def test_quick_rows_are_not_continued_by_a_thorough_run(results: Results, environment, tmp_path) -> None:
    path = tmp_path / "results.json"
    results.save(path)
    assert resume(path, "crossover", environment, {"plan": "quick"})[0].measurements == results.measurements
    found, aside = resume(path, "crossover", environment, {"plan": "default"})
    assert found.measurements == []
    assert "another plan" in aside


def test_resume_puts_a_damaged_file_aside(environment, tmp_path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{")
    found, aside = resume(path, "crossover", environment, {})
    assert found.measurements == []
    assert "cannot read" in aside


def test_environment_is_complete_and_serialisable(environment) -> None:
    data = dataclasses.asdict(environment)
    assert json.loads(json.dumps(data)) == data
    assert data["threads"] == torch.get_num_threads()
    assert data["torch"] == torch.__version__
    assert re.fullmatch(r"cpu-\d+core-[a-z0-9]+", data["slug"])
    assert device_slug(torch.device("cpu")) == data["slug"]


@pytest.mark.parametrize(
    "name",
    ["functional", "plan", "checks", "feature_maps", "cost", "cases", "measure", "timing", "reference", "ops"],
)
def test_fingerprint_covers_what_is_measured_and_how(name: str) -> None:
    assert f"{name}.py" in {path.name for path in measured_sources().values()}


def test_fingerprint_of_a_checkout_does_not_depend_on_the_build() -> None:
    names = set(measured_sources())
    assert ("kernels/bindings.cpp" in names) != ("_native" in names)
