"""The examples run by torchrun as the documentation says, on two processes, and agree with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
TINY = ("--steps", "4", "--batch", "4", "--dim", "16", "--context", "16")

pytestmark = pytest.mark.torchrun


def run(*command: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(*command: str | Path) -> str:
    return run(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process that sees whole batches."""
    out = tmp_path_factory.mktemp("alone")
    run(sys.executable, "examples/train_parallel.py", "--text", text, "--out", out, *TINY)
    return out


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_trains(mode: str, text: Path, alone: Path, tmp_path: Path) -> None:
    torchrun("examples/train_parallel.py", "--text", text, "--mode", mode, "--out", tmp_path, *TINY)
    losses = [
        [record["validation_loss"] for record in json.loads((folder / "result.json").read_text())["history"]]
        for folder in (tmp_path, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    weights, expected = (torch.load(folder / "model.pt")["model"] for folder in (tmp_path, alone))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], atol=1e-4), name


def test_a_sequence_in_slices() -> None:
    printed = torchrun("examples/sequence_parallel.py", "--length", "512", "--head-size", "16")
    assert printed.startswith("2 ranks, 512 positions")
