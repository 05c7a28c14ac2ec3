from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import linattn.lm.train
from linattn._util.environment import describe
from linattn.cli.main import main
from linattn.lm.text import Characters, Trigram
from linattn.training import tracking
from linattn.training.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sentences from a small grammar: enough regularity to learn within seconds."""
    generator = torch.Generator().manual_seed(0)
    words = [["the", "a", "every"], ["cat", "dog", "queen", "fool"], ["sees", "loves", "eats"], ["me", "fish", "him"]]
    lines = [
        " ".join(column[torch.randint(len(column), (), generator=generator)] for column in words) for _ in range(400)
    ]
    path = tmp_path / "text.txt"
    path.write_text(".\n".join(lines))
    return path


def train(*options: object) -> int:
    return main(["train", "lm", *map(str, options)])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("kernel", ["quadratic", "softmax", "taylor", "elu+1"])
def test_a_quick_run_leaves_everything_behind(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kernel: str
) -> None:
    out = tmp_path / "run"
    assert train("--text", text, "--kernel", kernel, "--quick", "--device", "cpu", "--out", out) == 0
    names = {"checkpoint.pt", "history.jsonl", "curve.png", "sample.txt", "results.json"}
    assert {path.name for path in out.iterdir()} == names

    found = results(out)
    characters = Characters.from_file(text)
    trigram = Trigram(characters.train, len(characters.alphabet)).loss(characters.validation)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert found["trigram_validation_loss"] == pytest.approx(trigram)
    assert found["validation_loss"] == history[-1]["validation_loss"] < history[0]["validation_loss"]
    assert found["beats_trigram"] is (found["validation_loss"] < trigram)
    assert found["settings"]["kernel"] == kernel
    assert found["settings"]["text"] == "text.txt"
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["device"] == describe(torch.device(found["settings"]["device"])).device
    line = characters.decode(characters.validation).split("\n")[1]
    sample = (out / "sample.txt").read_text()
    assert sample.startswith(line + "\n")
    assert len(sample) == len(line) + 1 + 80 + 1
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{found['validation_loss']:.4f} nats" in printed
    assert f"{trigram:.4f} nats" in printed


def test_a_trained_model_beats_the_trigram(text: Path, tmp_path: Path) -> None:
    options = ("--layers", 2, "--dim", 32, "--context", 32, "--batch", 16, "--lr", 8e-3, "--sample", 0)
    out = tmp_path / "run"
    assert train("--text", text, *options, "--steps", 120, "--validate-every", 60, "--out", out, "--no-figure") == 0
    assert results(out)["beats_trigram"] is True
    assert results(out)["settings"]["kernel"] == "quadratic"
    assert not (out / "sample.txt").exists()
    assert not (out / "curve.png").exists()


def quick_losses(out: Path) -> list[tuple[int, float | None, float]]:
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [(line["step"], line["train_loss"], line["validation_loss"]) for line in lines]


def test_interrupted_and_resumed_equals_uninterrupted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--text", text, "--quick", "--dropout", 0.1, "--no-figure")
    assert train(*options, "--out", whole) == 0

    real = linattn.lm.train.random_windows

    def interrupt(*sizes: Any, seed: int, step: int) -> Any:
        if step == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*sizes, seed=seed, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(linattn.lm.train, "random_windows", interrupt)
        assert train(*options, "--out", broken) == 130
    assert f"stopped at step 21; go on with: linattn train lm --out {broken} --resume" in capsys.readouterr().err
    assert not (broken / "results.json").exists()

    assert train("--out", broken, "--resume", "--no-figure") == 0
    assert quick_losses(broken) == quick_losses(whole)
    assert (broken / "sample.txt").read_text() == (whole / "sample.txt").read_text()
    weights = [read_checkpoint(out / "checkpoint.pt")["model"] for out in (whole, broken)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ctrl_c_from_outside_saves_and_exits_130(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "linattn", "train", "lm", "--text", text, "--quick", "--minutes", "5", "--steps"]
    command += ["1000000", "--out", out]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (out / "history.jsonl").exists() or len((out / "history.jsonl").read_text().splitlines()) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"--resume" in errors
    assert read_checkpoint(out / "checkpoint.pt")["step"] >= 15


@pytest.mark.slow
def test_a_resumed_run_can_be_made_longer_but_not_other(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train("--text", text, "--quick", "--out", out, "--no-figure") == 0
    assert train("--out", out, "--resume", "--steps", 40, "--no-figure") == 0
    assert results(out)["steps"] == 40
    assert train("--out", out, "--resume", "--dim", 64, "--kernel", "quadratic") == 2
    assert "dim=64 (the checkpoint has 32)" in capsys.readouterr().err
    other = tmp_path / "other.txt"
    other.write_text("Another text altogether. " * 50)
    assert train("--out", out, "--resume", "--text", other) == 2
    assert "trained on another text" in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_unasked(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = ("--text", text, "--quick", "--out", out, "--no-figure")
    assert train(*options) == 0
    before = (out / "checkpoint.pt").read_bytes()
    assert train(*options) == 2
    assert "--resume to go on with it, --overwrite to begin anew" in capsys.readouterr().err
    assert (out / "checkpoint.pt").read_bytes() == before
    assert train(*options, "--overwrite", "--seed", 1) == 0
    assert results(out)["settings"]["seed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no text was given; accepted: --text FILE"),
        (("--text", "nowhere.txt"), "there is no text file nowhere.txt; accepted: a plain text file"),
        (("--resume",), "there is no checkpoint"),
        (("--text", "TEXT", "--kernel", "quadratc"), "Did you mean 'quadratic'"),
        (("--text", "TEXT", "--heads", "3"), "dim=32 and heads=3"),
        (("--text", "TEXT", "--context", "100000"), "is too short; given: context=100000"),
        (("--text", "TEXT", "--context", "1000"), "given: context=1000; accepted: at most 761"),
        (("--text", "TEXT", "--form", "chunkd"), "unknown form 'chunkd'; accepted: 'chunked', 'direct', 'recurrent'"),
        (("--text", "TEXT", "--kernel", "identity"), "kernel='identity' was given"),
        (("--text", "TEXT", "--batch", "0"), "batch=0"),
        (("--text", "TEXT", "--seed", "-1"), "seed=-1"),
        (("--text", "TEXT", "--device", "abacus"), "device='abacus'"),
        (("--text", "TEXT", "--device", "cuda:99"), "given: device='cuda:99'; accepted: 'auto', 'cpu', 'cuda'"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    given = [str(text) if option == "TEXT" else option for option in options]
    assert train(*given, "--quick", "--out", tmp_path / "run") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("--out", tmp_path, "--resume", "--overwrite")
    assert "not allowed with" in capsys.readouterr().err


def test_a_disk_full_at_the_end_loses_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(linattn.lm.train, "atomic_file", full_disk)
        assert train("--text", text, "--quick", "--out", out, "--no-figure") == 2
    assert "No space left on device; the checkpoint is complete" in capsys.readouterr().err
    assert train("--out", out, "--resume", "--no-figure") == 0
    assert results(out)["steps"] == 30


def test_an_unreadable_checkpoint_is_named(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint.pt").write_text("rubbish")
    assert train("--out", tmp_path, "--resume") == 2
    assert f"{tmp_path / 'checkpoint.pt'} cannot be read" in capsys.readouterr().err


def test_matplotlib_is_asked_for_before_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train("--text", text, "--quick", "--out", tmp_path / "run") == 2
    assert "--no-figure" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_tracker_gets_curve_and_hyperparameters(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    kept: dict[str, Any] = {}

    class Recorder:
        def __init__(self, folder: Path, resumed_at: int | None) -> None:
            kept["opened"] = (folder, resumed_at)

        def scalars(self, step: int, values: Any) -> None:
            calls.append("scalars")

        def figure(self, step: int, name: str, figure: Any) -> None:
            calls.append("figure")
            kept["figure"] = figure

        def hyperparameters(self, values: Any, found: Any) -> None:
            calls.append("hyperparameters")
            kept["results"] = found

        def close(self) -> None:
            calls.append("close")

    monkeypatch.setattr(tracking, "TensorBoardTracker", Recorder)
    out = tmp_path / "run"
    assert train("--text", text, "--quick", "--out", out, "--tensorboard") == 0
    assert calls == ["scalars"] * 3 + ["figure", "hyperparameters", "close"]
    assert kept["opened"] == (out / "tensorboard", None)
    assert kept["results"]["result/validation"] == results(out)["validation_loss"]
    left, right = kept["figure"].axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("optimiser steps", "wall time of training (minutes)")
    assert left.get_ylabel() == "loss (nats per character)"
    lines = {line.get_label(): line for line in right.get_lines()}
    trigram = next(line for label, line in lines.items() if label.startswith("trigram"))
    assert list(trigram.get_ydata()) == [results(out)["trigram_validation_loss"]] * 2
    assert len(lines["validation"].get_xdata()) == 3
    low, high = left.get_ylim()
    assert all(low < loss < high for loss in [*trigram.get_ydata(), *lines["validation"].get_ydata()[1:]])


def test_a_tracker_without_a_figure_needs_no_matplotlib(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Recorder:
        def __init__(self, folder: Path, resumed_at: int | None) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return lambda *_: calls.append(name)

    monkeypatch.setattr(tracking, "TensorBoardTracker", Recorder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "run"
    assert train("--text", text, "--quick", "--out", out, "--tensorboard", "--no-figure") == 0
    assert calls == ["scalars"] * 3 + ["hyperparameters", "close"]
    assert not (out / "curve.png").exists()
