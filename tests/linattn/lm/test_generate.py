from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linattn.cli.main import main
from linattn.training.checkpoint import read_checkpoint, write_checkpoint

TEXT = "the cat sat on the mat. " * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny hybrid that has all but learned its one sentence."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    options = ["--text", folder / "text.txt", "--quick", "--kernel", "elu+1,softmax", "--layers", 2, "--context", 24]
    options += ["--steps", 100, "--lr", 1e-2, "--out", folder / "run", "--no-figure", "--sample", 0, "--device", "cpu"]
    assert main(["train", "lm", *map(str, options)]) == 0
    return folder / "run"


def generate(run: Path, *options: object) -> int:
    return main(["generate", str(run), *map(str, options)])


def test_a_trained_run_goes_on_with_a_prompt(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert generate(trained, "--prompt", "the cat", "--count", 41, "--temperature", 0) == 0
    assert capsys.readouterr().out == (TEXT[:48] + "\n")


def test_it_ends_at_a_stop_character(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert generate(trained, "--prompt", "the cat", "--stop", ".", "--temperature", 0) == 0
    assert capsys.readouterr().out == "the cat sat on the mat.\n"


def test_the_same_seed_gives_the_same_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed, options in ((1, []), (1, []), (2, []), (1, ["--top-k", 1]), (1, ["--top-p", 0.01])):
        capsys.readouterr()
        assert generate(trained, "--prompt", "the", "--seed", seed, "--temperature", 3, "--count", 60, *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4] == TEXT[:63] + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "zebra"], "the character 'z' is not in the alphabet"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "t", "--temperature", "-1"], "temperature=-1"),
        (["--prompt", "t", "--look-back", "0"], "look_back=0"),
        (["--prompt", "t", "--stop", "?"], "the character '?' is not in the alphabet"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    capsys.readouterr()
    assert generate(trained, *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_folders_without_a_usable_checkpoint_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tmp_path) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    checkpoint = read_checkpoint(trained / "checkpoint.pt")
    alphabet = checkpoint["settings"].pop("alphabet")
    write_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    assert generate(tmp_path) == 2
    assert "names no alphabet" in capsys.readouterr().err
    checkpoint["settings"]["alphabet"] = alphabet + "!"
    write_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    assert generate(tmp_path) == 2
    assert "does not fit its own settings" in capsys.readouterr().err
    assert torch.is_tensor(checkpoint["model"]["embedding.weight"])
