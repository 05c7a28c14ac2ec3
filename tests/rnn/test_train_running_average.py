"""The command that trains the running average, small; and that an interrupted run goes on bit for bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from linattn.cli.main import main
from linattn.rnn.commands.train_running_average import add_arguments, train_one


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="figures")
    out = tmp_path / "out"
    options = ["--batches", "100", "--hidden", "8", "--lr", "0.01", "--layers", "1", "--cells", "rnn"]
    assert main(["train", "running-average", *options, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    summary = [(row["network"], row["targets"]) for row in results["summary"]]
    assert summary == [("RNN, 1 layer", "all"), ("RNN, 1 layer", "last")]
    for one in results["runs"]:
        # Predicting 0 costs 0.29 on all targets and 0.1 on the last.
        assert one["validation"] < (0.15 if one["targets"] == "all" else 0.07)
        assert one["training"] < (0.15 if one["targets"] == "all" else 0.07)
    assert "4096 fresh sequences" in capsys.readouterr().out


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def trained(folder: str, *batches: int) -> dict[str, torch.Tensor]:
        for count in batches:
            resume = ["--resume"] if count != batches[0] else []
            args = parser.parse_args(
                ["--batches", str(count), "--hidden", "6", "--out", str(tmp_path / folder), *resume]
            )
            found = train_one("lstm", 1, "all", 3, args)
            assert found is not None
        return found[1].state_dict()

    at_once, in_pieces = trained("a", 60), trained("b", 25, 60)
    assert all(torch.equal(at_once[name], in_pieces[name]) for name in at_once)
