"""The `linattn` command: names, exit statuses, what goes to which stream."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import linattn
from linattn.cli.main import COMMANDS, Command, main
from linattn.errors import DataError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command of two words, `try it`, that records its arguments and does what `--then` says."""
    module = types.ModuleType("linattn_test_command")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--then", default="done")

    def run(args: argparse.Namespace) -> int:
        if args.then == "fail":
            raise DataError("text.txt: no such file")
        if args.then == "interrupt":
            raise KeyboardInterrupt
        print("ran")
        return 0

    module.add_arguments, module.run = add_arguments, run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, "try it", Command(module.__name__, "for this test"))
    return module


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"linattn {linattn.__version__}\n"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--help"]) == 0
    out = capsys.readouterr().out
    assert "  sweep ae " in out
    assert "  sweep batching " in out
    assert "probe" not in out.split("commands:")[1]


def test_no_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: linattn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["inof"], "'info'"),
        (["crosover", "--quick"], "'crossover'"),
        (["train", "ml"], "'train lm'"),
        (["train"], "'train lm'"),
    ],
)
def test_unknown_command_suggests_the_nearest(
    words: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"Did you mean {suggestion}?" in captured.err


def test_command_of_two_words_runs(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "it"]) == 0
    assert capsys.readouterr().out == "ran\n"


def test_error_of_the_library_is_one_line_and_status_2(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["try", "it", "--then", "fail"]) == 2
    assert capsys.readouterr().err == "linattn: text.txt: no such file\n"


def test_interrupt_is_status_130(command: types.ModuleType) -> None:
    assert main(["try", "it", "--then", "interrupt"]) == 130


def test_a_reader_that_went_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "linattn", "--help"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_declares_its_options(name: str) -> None:
    module = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert callable(module.run)
    assert parser.format_help()


@pytest.mark.parametrize("causal", [False, True])
def test_explain_prints_what_the_library_says_of_such_a_call(causal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "--kernel", "quadratic", "--shape", "1", "2", "64", "4", "3", "--dtype", "float64"]
    assert main([*words, "--causal"] if causal else words) == 0
    q, v = torch.ones(1, 2, 64, 4, dtype=torch.float64), torch.ones(1, 2, 64, 3, dtype=torch.float64)
    assert capsys.readouterr().out == f"{linattn.explain(q, q, v, kernel='quadratic', is_causal=causal)}\n"


def test_explain_needs_no_memory_for_its_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--shape", "1024", "1024", "1048576", "1024"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "1", "2", "3"],
        ["--shape", "1", "2", "-3", "4"],
        ["--shape", "1", "2", "3", "4", "--device", "toaster"],
        ["--shape", "1", "2", "3", "4", "--kernel", "quadartic"],
    ],
)
def test_explain_refuses_what_it_cannot_read(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *words]) == 2
    assert capsys.readouterr().err.startswith("linattn: ")
