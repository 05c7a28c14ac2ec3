"""`linattn train ae`, `linattn probe` and `linattn sweep ae` from the command line, on a small set of one's own."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linattn.autoencoders.data.sets import SampleSet
from linattn.autoencoders.experiments import sweep
from linattn.cli.main import main
from linattn.training.trainer import Trainer

TRAIN = ("--hidden", 6, 3, "--epochs", 2, "--batch", 20, "--lr", 0.01, "--labels", 12, "--no-figure")
SWEEP = ("--k", 2, 9, "--epochs", 2, "--repeats", 2, "--workers", 1, "--no-figure")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """120 samples of size 16 in three classes."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 120)
    path = tmp_path / "own.npz"
    np.savez(path, x=3 * np.eye(3, 16)[y] + random.normal(size=(120, 16)), y=y)
    return path


def call(*words: object) -> int:
    return main([str(word) for word in words])


def train(own: Path, out: Path, *options: object) -> int:
    return call("train", "ae", "--set", "file", "--data", own, "--out", out, *TRAIN, *options)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- train and probe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["vanilla", "denoising", "masked"])
def test_a_run_leaves_its_results_and_can_be_probed(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    out = tmp_path / "run"
    assert train(own, out, "--objective", objective, "--repeats", 2) == 0
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "history.jsonl", "results.json"}
    results = read(out / "results.json")
    assert results["settings"]["objective"] == objective
    assert results["settings"]["hidden"] == [6, 3]
    assert results["epochs"] == 2
    assert len(results["measures"]["accuracy"]) == 2
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["measures"] == results["measures"]
    assert str(tmp_path) not in (out / "results.json").read_text()

    assert call("probe", out, "--data", own, "--draws", 3, "--epochs", 20) == 0
    found = read(out / "probe.json")
    assert found["labelled samples"] == 12
    assert np.shape(found["codes"]) == (3, 2)
    assert np.shape(found["raw samples"]) == (3, 1)
    assert "probe on" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(own, tmp_path / "whole", "--epochs", 4) == 0
    step = Trainer._train_step

    def stop(trainer: Trainer) -> None:
        step(trainer)
        if trainer.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", stop)
    assert train(own, tmp_path / "parts", "--epochs", 4) == 130
    monkeypatch.undo()
    assert call("train", "ae", "--out", tmp_path / "parts", "--resume", "--data", own, "--no-figure") == 0
    assert (
        read(tmp_path / "parts" / "results.json")["measures"] == read(tmp_path / "whole" / "results.json")["measures"]
    )


def test_a_finished_run_is_neither_overwritten_nor_changed_unasked(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(own, out) == 0
    assert train(own, out) == 2
    assert "accepted: --resume to go on with it, --overwrite" in capsys.readouterr().err
    assert call("train", "ae", "--out", out, "--resume", "--data", own, "--hidden", 7, "--labels", 5) == 2
    assert "cannot go on with hidden=(7,) (the checkpoint has (6, 3)), labels=5" in capsys.readouterr().err
    other = own.with_name("other.npz")
    np.savez(other, x=np.ones((120, 16)), y=np.zeros(120, int))
    for words in (("probe", out), ("train", "ae", "--resume", "--out", out)):
        assert call(*words, "--data", other) == 2
        assert "was trained on other samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "mnits"), "Did you mean 'mnist'"),
        (("--objective", "mask"), "Did you mean 'masked'"),
        (("--objective", "masked", "--mask", "1"), "given: 1.0; accepted: a number in [0, 1)"),
        (("--activation", "rleu"), "Did you mean 'relu'"),
        (("--patch", 2), "one size"),
        (("--labels", 500), "500 labelled samples were asked for; accepted: at most"),
    ],
)
def test_wrong_use_is_one_line(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], message: str
) -> None:
    assert train(own, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [("--hidden", "0"), ("--epochs", "-1"), ("--hidden", "2.5")])
def test_sizes_below_one_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        call("train", "ae", *words)
    assert "accepted: a whole number from 1 on" in capsys.readouterr().err


def test_without_labels_the_encoder_trains_and_the_probe_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(50, 4)))
    assert train(path, tmp_path / "run") == 0
    assert "accuracy" not in read(tmp_path / "run" / "results.json")["measures"]
    assert call("probe", tmp_path / "run", "--data", path) == 2
    assert "the set 'file' has no labels" in capsys.readouterr().err
    assert call("sweep", "ae", "--set", "file", "--data", path, *SWEEP, "--out", tmp_path / "sweep") == 2
    assert "the set 'file' has no labels" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_of_a_run_of_images(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    pytest.importorskip("sklearn", reason="the handwritten digits need scikit-learn")
    options = ("--set", "digits", "--epochs", 1, "--validate-every", 1, "--labels", 20)
    dense = {"curve.png", "latent.png", "reconstructions.png", "filters.png", "spectrum.png"}
    for name, more, figures in (
        ("dense", ("--hidden", 8, 2, "--objective", "masked"), dense),
        ("one", ("--hidden", 1), dense),
        (
            "patches",
            ("--hidden", 8, "--patch", 4, "--mask", 0.5, "--objective", "masked"),
            dense - {"filters.png", "spectrum.png"},
        ),
    ):
        assert call("train", "ae", *options, *more, "--out", tmp_path / name) == 0
        drawn = {path.name: path.read_bytes()[:4] for path in (tmp_path / name).glob("*.png")}
        assert drawn == dict.fromkeys(figures, b"\x89PNG")


# ---- sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_every_curve_a_table_and_figures(own: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    out = tmp_path / "sweep"
    assert call("sweep", "ae", "--set", "file", "--data", own, *SWEEP[:-1], "--out", out) == 0
    results = read(out / "results.json")
    assert [(c["model"], c["objective"], c["k"]) for c in results["cells"]] == [
        (model, objective, k)
        for model in ("linear", "relu")
        for objective in ("vanilla", "denoising", "masked")
        for k in (2, 9)
    ]
    for cell in results["cells"]:
        assert cell["epochs"] == [0, 1, 2]
        assert cell["seconds"] > 0
        assert {name: np.shape(curves) for name, curves in cell["curves"].items()} == dict.fromkeys(
            ("train", "validation", "reconstruction", "accuracy"), (2, 3)
        )
        # No linear code does better than principal components on what these were computed from; here: nearly.
        if cell["model"] == "linear":
            assert min(curve[-1] for curve in cell["curves"]["reconstruction"]) > 0.95 * cell["pca"]
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0]["k"] == "2"
    assert float(rows[0]["lowest"]) <= float(rows[0]["probe %"])
    assert {path.name for path in out.glob("*.png")} == {
        "epochs-vanilla.png",
        "epochs-denoising.png",
        "epochs-masked.png",
        "objectives.png",
        "sizes.png",
    }


def test_a_sweep_goes_on_where_it_was_stopped_and_ends_the_same(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("sweep", "ae", "--set", "file", "--data", own, *SWEEP, "--models", "linear")
    assert call(*options, "--out", tmp_path / "whole") == 0
    done: list[str] = []

    def work(job: sweep.SweepJob, data: SampleSet) -> dict[str, Any] | None:
        done.append(job.name)
        return None if len(done) == 3 else real(job, data)

    real = sweep.work
    monkeypatch.setattr(sweep, "work", work)
    assert call(*options, "--out", tmp_path / "parts") == 130
    assert "stopped with 2 of 6 jobs done" in capsys.readouterr().err
    assert call(*options, "--out", tmp_path / "parts") == 0
    assert done[3:] == done[2:3] + done[4:]
    assert len(done) == 3 + 4

    whole, parts = (read(tmp_path / name / "results.json")["cells"] for name in ("whole", "parts"))
    assert [cell["curves"] for cell in parts] == [cell["curves"] for cell in whole]
    assert len(read(tmp_path / "parts" / "results.json")["sessions"]) == 2

    assert call(*options, "--out", tmp_path / "parts", "--epochs", 1) == 2
    assert "was made with {'epochs': 2}; accepted: {'epochs': 1}, or --overwrite" in capsys.readouterr().err
    assert call(*options, "--out", tmp_path / "parts", "--seed", 1) == 2
    assert "were done on other samples" in capsys.readouterr().err
    (tmp_path / "parts" / "jobs" / f"{done[0]}.json").write_text("{")
    assert call(*options, "--out", tmp_path / "parts") == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_pinned_table_of_the_synthetic_set(tmp_path: Path) -> None:
    """The whole set and training, one repeat. At k = 5 chance decides which of the equal directions are found."""
    words = ("--k", 5, 20, 100, 500, "--models", "linear", "--objectives", "vanilla", "--repeats", 1, "--workers", 2)
    assert call("sweep", "ae", "--set", "synthetic", *words, "--out", tmp_path, "--no-figure") == 0
    found = {int(row["k"]): row for row in csv.DictReader((tmp_path / "table.csv").read_text().splitlines())}
    losses = {k: float(row["training"]) for k, row in found.items()}
    accuracies = {k: float(row["probe %"]) for k, row in found.items()}
    assert losses[5] == pytest.approx(229.8, rel=0.01)
    assert losses[20] == pytest.approx(79.9, rel=0.01)
    assert losses[100] <= 0.6
    assert losses[500] <= 0.005
    assert 55 < accuracies[5] < 80
    assert [accuracies[k] for k in (20, 100, 500)] == pytest.approx([98.3, 98.0, 98.4], abs=1)


def test_processes_side_by_side_find_what_one_finds(own: Path, tmp_path: Path) -> None:
    options = ("sweep", "ae", "--set", "file", "--data", own, *SWEEP, "--models", "linear", "--objectives", "masked")
    assert call(*options, "--out", tmp_path / "one") == 0
    assert call(*options, "--workers", 2, "--out", tmp_path / "two") == 0
    one, two = (read(tmp_path / name / "results.json")["cells"] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name, curves in a["curves"].items():
            for ours, theirs in zip(curves, b["curves"][name], strict=True):
                assert ours[1:] == pytest.approx(theirs[1:], rel=1e-4), name
