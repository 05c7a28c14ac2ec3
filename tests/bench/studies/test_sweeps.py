"""The studies that are made of many training runs: at tiny sizes, interrupted, and gone on with."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from linattn.bench.studies.attention import lm, recall
from linattn.bench.studies.attention.recall import (
    CELLS,
    NOTHING,
    SYMBOLS,
    Cell,
    RecallModel,
    RecallSettings,
    draw_sequences,
)
from linattn.bench.studies.common.sweep import sweep
from linattn.cli.main import main
from linattn.errors import DataError

pytest.importorskip("matplotlib", reason="the figures need matplotlib")

SENTENCES = "the cat sat on the mat. a dog sees the queen. every fool loves fish. "


def work_on(done: list[str], interrupted_at: str = "") -> Any:
    def work(name: str, folder: Path) -> bool:
        if name == interrupted_at:
            return False
        done.append(name)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"settings": {"size": len(name)}, "of": name}))
        return True

    return work


def test_a_sweep_does_what_is_missing_only(tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {"a": {"size": 1}, "bb": {"size": 2}, "ccc": {"size": 3}}
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        sweep(runs, tmp_path, work_on(done, interrupted_at="bb"))
    assert done == ["a"]
    found = sweep(runs, tmp_path, work_on(done))
    assert done == ["a", "bb", "ccc"]
    assert [results["of"] for results in found.values()] == ["a", "bb", "ccc"]
    with pytest.raises(DataError, match=r"was made with {'size': 2}; accepted: {'size': 9}"):
        sweep({"bb": {"size": 9}}, tmp_path, work_on(done))


# ---- recall ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_recall_asks_for_each_pair_once(cell: Cell) -> None:
    tokens, answers = draw_sequences(cell, 20, seed=0, step=3)
    assert tokens.shape == answers.shape == (20, cell.length)
    for row, answer in zip(tokens.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(row[0 : 2 * cell.pairs : 2], row[1 : 2 * cell.pairs : 2], strict=True))
        assert len(pairs) == cell.pairs
        assert max(pairs) < SYMBOLS <= min(pairs.values())
        asked = {t: token for t, token in enumerate(row) if t >= 2 * cell.pairs and token != NOTHING}
        assert sorted(asked.values()) == sorted(pairs)
        assert {t: pairs[key] - SYMBOLS for t, key in asked.items()} == {t: a for t, a in enumerate(answer) if a >= 0}
    again = draw_sequences(cell, 20, seed=0, step=3)
    assert torch.equal(tokens, again[0])
    assert torch.equal(answers, again[1])
    assert not torch.equal(tokens, draw_sequences(cell, 20, seed=0, step=4)[0])


def test_the_state_of_a_recall_model_is_what_decoding_keeps() -> None:
    def held(kernel: str, N: int) -> int:
        return RecallModel(RecallSettings(kernel, 8, 0, 1)).state_bytes(N)

    counts = 2 * 2 * 8  # the tokens seen, of each layer, as int64; and the state's own n
    assert held("softmax", 256) == 2 * 256 * (8 + 8) * 4 + counts // 2
    assert held("elu+1", 64) == held("elu+1", 256) == 2 * 8 * (8 + 1) * 4 + counts
    assert held("quadratic", 64) == held("taylor", 256) == 2 * (45 * 8 + 8 * 8 + 8) * 4 + counts + 2 * 8
    assert held("softmax", 64) < held("quadratic,softmax", 256) < held("softmax", 256)


@pytest.mark.slow
def test_the_recall_study_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recall, "TOKENS_A_STEP", 256)
    monkeypatch.setattr(recall, "TEST_SEQUENCES", 8)
    words = ["study", "recall", "--out", str(tmp_path), "--kernels", "softmax elu+1", "--sizes", "8", "--seeds", "1"]
    words += ["--steps", "8", "--device", "cpu", "--workers", "1"]
    real, steps = recall.draw_sequences, []

    def interrupt(cell: Cell, count: int, *, seed: int, step: int) -> Any:
        steps.append(step)
        if len(steps) == 9 + 8 + 4 * 9 + 9 + 9 + 3:  # the third step of the second run
            os.kill(os.getpid(), signal.SIGINT)
        return real(cell, count, seed=seed, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(recall, "draw_sequences", interrupt)
        assert main(words) == 130
    finished = [path.parent.name for path in tmp_path.rglob("results.json")]
    assert finished == ["softmax-D8-seed0"]
    before = {name: (tmp_path / name / "results.json").stat().st_mtime_ns for name in finished}
    assert main(words) in (0, 1)  # eight steps teach nothing: the claim on softmax is broken
    assert {name: (tmp_path / name / "results.json").stat().st_mtime_ns for name in finished} == before
    printed = capsys.readouterr().out
    assert "BROKEN: 64 pairs in 256 tokens, accuracy: softmax, D = 8" in printed
    assert "2 runs" in printed
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "elu+1-D8-seed0" / "results.json").read_text())
    assert set(results["accuracy"]) == {f"{cell.pairs} of {cell.length}" for cell in CELLS}
    assert all(0 <= share <= 1 for share in results["accuracy"].values())


@pytest.mark.slow
def test_recall_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "recall", "--out", str(tmp_path), "--kernels", "elu+1", "--sizes", "8", "--steps", "2"]
    assert main([*words, "--device", "cpu", "--workers", "2"]) == 0
    assert set(json.loads((tmp_path / "runs.json").read_text())) == {"elu+1-D8-seed0", "elu+1-D8-seed1"}
    assert "2 of 2 runs" in capsys.readouterr().err


def test_a_run_that_never_left_the_plateau_is_named_and_does_not_count_as_forgetting() -> None:
    def found(D: int, seed: int, accuracy: float) -> dict[str, Any]:
        shares = {f"{cell.pairs} of {cell.length}": accuracy for cell in CELLS}
        settings = {"kernel": "elu+1", "head_dim": D, "seed": seed}
        return {"settings": settings, "accuracy": shares, "state_bytes": {str(cell.length): D for cell in CELLS}}

    results = [found(8, 0, 0.5), found(8, 1, 0.45), found(16, 0, 0.04), found(16, 1, 0.9)]
    assert recall.untrained(results, ["elu+1"], [8, 16]) == ["elu+1 D=16 (1 of 2)"]
    assert "elu+1 D=16 (1 of 2)" in recall.table(results, ["elu+1"], [8, 16])
    assert [claim.measured for claim in recall.claims_of(results, ["elu+1"], [8, 16])] == pytest.approx([0.5, 0.4])
    lines = recall.draw(results, ["elu+1"], [8, 16]).axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[50, 90], [50], [45], [90], [4]]


@pytest.mark.slow
def test_recall_is_learned_by_softmax(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four pairs among eight symbols, in a few seconds."""
    monkeypatch.setattr(recall, "CELLS", (Cell(4, 16),))
    monkeypatch.setattr(recall, "TOKENS_A_STEP", 512)
    monkeypatch.setattr(recall, "SYMBOLS", 8)
    monkeypatch.setattr(recall, "NOTHING", 16)
    assert recall.train(RecallSettings("softmax", 16, 0, 250, dim=32, lr=1e-2), tmp_path, torch.device("cpu"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"]["4 of 16"] > 0.9


# ---- language models -------------------------------------------------------------------------------------------------


RUNS = (("first-16", 0), ("first-16", 1), ("first-32", 0), ("second-16", 0))


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for path, count in zip(paths, (30, 40), strict=True):
        path.write_text(SENTENCES * count)
    return paths


def test_the_language_model_study_goes_on_where_it_was_interrupted(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm, "QUICK", dataclasses.replace(lm.QUICK, kernels=("softmax",)))
    words = ["study", "lm", "--quick", "--seeds", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += [word for path in texts for word in ("--text", str(path))]
    real, calls = lm.train.random_windows, []

    def interrupt(*sizes: Any, seed: int, step: int) -> Any:
        calls.append(step)
        if len(calls) == lm.QUICK.steps + 13:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*sizes, seed=seed, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(lm.train, "random_windows", interrupt)
        assert main(words) == 130
    assert len(list((tmp_path / "out").rglob("results.json"))) == 1
    assert main(words) in (0, 1)  # twenty steps need not beat a trigram
    names = {path.parent.name for path in (tmp_path / "out").rglob("results.json")}
    assert names == {f"{run}-softmax-seed{seed}" for run, seed in RUNS}
    printed = capsys.readouterr().out
    assert "4 runs of 20 steps of 128 characters" in printed
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    claim = json.loads((tmp_path / "out" / "result.json").read_text())["claims"][-1]
    runs = [json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in names]
    leads = [run["trigram_validation_loss"] - run["validation_loss"] for run in runs]
    assert claim["measured"] == pytest.approx(min(leads))


def test_all_runs_of_a_study_share_one_budget() -> None:
    plan = lm.plan_runs(lm.SMALL, [Path("a/one.txt"), Path("two.txt")], 0, 3, "cpu")
    assert len(plan) == 5 * 3 + 5 + 5
    assert {options["steps"] for options in plan.values()} == {lm.SMALL.steps}
    assert {options["batch"] * options["context"] for options in plan.values()} == {lm.SMALL.characters}
    assert {options["kernel"] for options in plan.values()} == {"softmax", "quadratic", "taylor", "elu+1", lm.HYBRID}
    full = lm.plan_runs(lm.FULL, [Path("one.txt")], 0, 1, "cuda")
    assert {options["kernel"] for options in full.values()} > {options["kernel"] for options in plan.values()}


def test_a_study_of_language_models_needs_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "lm"]) == 2
    assert "no text was given; accepted: --text FILE" in capsys.readouterr().err
