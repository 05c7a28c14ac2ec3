"""`linattn runs` on folders that the trainer itself wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from linattn.cli.main import main
from linattn.training import compare_runs
from linattn.training.checkpoint import HISTORY_NAME
from linattn.training.trainer import Trainer, TrainingConfig


def make_run(folder: Path, *, finished: bool = True, steps: int = 6, **settings: Any) -> Trainer:
    """Train a line by the real trainer; a finished run has results as well."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 16)[:, None]
    kept: Mapping[str, Any] = {"kernel": "softmax", "lr": 0.01, "width": 1, **settings}
    config = TrainingConfig(steps=steps, validate_every=3, learning_rate=kept["lr"])
    trainer = Trainer(
        model,
        lambda step: (model(x) - 3 * x).square().mean(),
        lambda: (model(x) - 3 * x).square().mean().item(),
        config,
        folder=folder,
        settings=kept,
    )
    trainer.run()
    if finished:
        (folder / "results.json").write_text(json.dumps({"settings": kept}))
    return trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs, the second one the best, the third unfinished and the longest."""
    make_run(tmp_path / "all" / "slow", lr=0.01)
    make_run(tmp_path / "all" / "deeper" / "fast", lr=0.5, kernel="quadratic")
    make_run(tmp_path / "all" / "open", lr=0.02, steps=9, finished=False)
    return tmp_path / "all"


def first_words(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines()[1:] if line.split()]


def test_runs_are_listed_best_first_with_the_settings_that_differ(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(folder), "--no-figure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "kernel", "lr", "steps", "minutes", "last", "best"]
    assert lines[1].split()[:4] == ["deeper/fast", "quadratic", "0.5", "6"]
    assert lines[1].endswith("  finished")
    assert next(line for line in lines if line.startswith("open")).endswith("not finished")


@pytest.mark.parametrize(
    ("order", "first"), [("run", "deeper/fast"), ("steps", "open"), ("last", "deeper/fast"), ("best", "deeper/fast")]
)
def test_rows_are_sorted_as_asked(order: str, first: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder), "--no-figure", "--sort", order, "--top", "1"]) == 0
    assert first_words(capsys.readouterr().out) == [first, "..."]


def test_losses_are_those_of_the_history(folder: Path) -> None:
    for found in compare_runs.find(folder):
        lines = [json.loads(line) for line in (folder / found.name / HISTORY_NAME).read_text().splitlines()]
        assert found.best == min(line["validation_loss"] for line in lines)
        assert [record.step for record in found.history] == [line["step"] for line in lines]


def test_the_figure_shows_every_run_and_names_the_best(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    found = compare_runs.find(folder)
    left, right = compare_runs.draw(found).axes
    assert len(left.get_lines()) == len(right.get_lines()) == 3
    by_label = {str(line.get_label()): line for line in left.get_lines()}
    best = min(found, key=lambda one: one.best)
    assert f"{best.best:.3f}  kernel quadratic, lr 0.5" in by_label
    assert (left.get_ylabel(), left.get_xlabel()) == ("validation loss", "optimiser steps")
    low, high = left.get_ylim()
    assert all(low < r.validation_loss < high for one in found for r in one.history if r.step)
    target = tmp_path / "new" / "figure.png"
    assert main(["runs", str(folder), "--figure", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_written_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    (tmp_path / "file").touch()
    assert main(["runs", str(folder), "--figure", str(tmp_path / "file" / "figure.png")]) == 2
    assert str(tmp_path / "file" / "figure.png") in capsys.readouterr().err


def test_with_very_many_runs_only_the_best_have_a_colour(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    one = compare_runs.find(folder)[0]
    many = [compare_runs.Run(str(i), {"lr": i}, one.history, True) for i in range(200)]
    figure = compare_runs.draw(many)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == compare_runs.HIGHLIGHTED + 1
    assert labels[-1] == "193 others"


def test_a_run_without_checkpoint_has_a_row_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", finished=False)
    (tmp_path / "a" / "checkpoint.pt").unlink()
    make_run(tmp_path / "b", lr=0.5)
    assert main(["runs", str(tmp_path), "--no-figure"]) == 0
    assert first_words(capsys.readouterr().out) == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "content"), [(HISTORY_NAME, "{"), (HISTORY_NAME, '{"step": 1}'), ("results.json", "[]")]
)
def test_damaged_files_are_named(name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    (tmp_path / "a" / name).write_text(content)
    assert main(["runs", str(tmp_path), "--no-figure"]) == 2
    assert str(tmp_path / "a" / name) in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nowhere"], ["."], [".", "--top", "0"]])
def test_nothing_to_list_is_an_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *words]) == 2
    assert "accepted: " in capsys.readouterr().err


def test_matplotlib_is_asked_for_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["runs", str(folder)]) == 2
    assert "--no-figure" in capsys.readouterr().err
