"""Every study runs by its command at a small size, its claims hold, and it leaves a figure and a JSON behind."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from linattn._util import argtypes
from linattn.bench.studies.common import study
from linattn.bench.studies.common.study import Claim
from linattn.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[3]
SMALL = {
    "scaling": ["--samples", "4000", "--queries", "64"],
    "argmax": ["--steps", "120"],
    "kernels": ["--rows", "20000"],
    "maps": ["--draws", "4", "--steps", "60"],
    "karate": ["--epochs", "700"],
    "accumulation": ["--steps", "200"],
    "pca": ["--steps", "1000"],
    "decay": ["--epochs", "60"],
    "gradients": [],
    "beam": ["--seconds", "0"],  # nothing is timed in a test
}
NEEDS_DIGITS = ("accumulation", "depth", "pca")


def run_study(name: str, out: Path, *options: str) -> int:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    if name in NEEDS_DIGITS:
        pytest.importorskip("sklearn", reason="the handwritten digits need scikit-learn")
    return main(["study", name, "--out", str(out), *options])


def claims_in(out: Path) -> list[dict[str, object]]:
    claims: list[dict[str, object]] = json.loads((out / study.RESULT_NAME).read_text())["claims"]
    return claims


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_study_holds_what_it_claims(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_study(name, tmp_path / "out", *SMALL[name])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {study.FIGURE_NAME, study.RESULT_NAME}
    assert (tmp_path / "out" / study.FIGURE_NAME).read_bytes().startswith(b"\x89PNG")
    found = claims_in(tmp_path / "out")
    assert found
    for claim in found:
        assert claim["holds"] is True
        assert f"holds: {claim['claim']}" in printed


def test_a_broken_claim_is_told_by_status_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_study("argmax", tmp_path, "--steps", "1") == 1
    broken = [claim for claim in claims_in(tmp_path) if not claim["holds"]]
    assert [claim["claim"] for claim in broken] == ["accuracy of the lookup trained through softmax"]
    assert f"BROKEN: {broken[0]['claim']}" in capsys.readouterr().out


def test_every_study_is_a_command_and_a_script() -> None:
    modules = {name.removeprefix("study "): command.module for name, command in COMMANDS.items() if "study " in name}
    assert modules.keys() == {*SMALL, "depth", "recall", "lm", "conversion"}
    for name, module in modules.items():
        assert module.startswith("linattn.bench.studies.")
        assert module.endswith(f".{name}")
        assert (ROOT / f"{module.removeprefix('linattn.').replace('.', '/')}.py").is_file()


def test_a_script_runs_from_anywhere(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs matplotlib")
    command = [
        sys.executable,
        ROOT / "bench" / "studies" / "attention" / "argmax.py",
        "--steps",
        "120",
        "--out",
        "here",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "here" / study.FIGURE_NAME).is_file()


def test_matplotlib_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["study", "scaling", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'linattn[studies]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NEEDS_DIGITS)
def test_scikit_learn_is_asked_for_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="it is asked for first")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["study", name, "--out", str(tmp_path)]) == 2
    assert "'scikit-learn'" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--seed", "-1"), ("--samples", "0"), ("--queries", "many")])
def test_counts_that_are_none_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    study.add_common_arguments(parser, "x")
    parser.add_argument("--samples", type=argtypes.whole)
    parser.add_argument("--queries", type=argtypes.whole)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"{option}={value}"])
    assert f"{value!r} was given; accepted: a whole number from" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run_study("argmax", tmp_path / "file", "--steps", "1") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("relation", "limit", "holds"),
    [("<=", 1.0, True), ("<", 1.0, False), (">=", 1.0, True), (">", 1.0, False), ("==", 1.0, True), ("==", 2.0, False)],
)
def test_a_claim_holds_by_its_relation(relation: str, limit: float, holds: bool) -> None:
    assert Claim("one", 1.0, relation, limit).holds is holds  # type: ignore[arg-type]


def test_a_claim_about_nothing_is_broken() -> None:
    assert not Claim("not a number", float("nan"), "<=", 1.0).holds
