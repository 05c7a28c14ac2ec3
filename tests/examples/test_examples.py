"""The examples run as their first lines say, and those by torchrun agree with one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
LINES = 60
TINY = ("--steps", "4", "--batch", "4", "--dim", "16", "--context", "16")


def run(*command: str | Path) -> str:
    """Run from the root, where the checkout is imported from, whatever is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(ranks: int, *command: str | Path) -> str:
    options = ("--standalone", "--nproc-per-node", str(ranks))
    return run(sys.executable, "-m", "torch.distributed.run", *options, *command)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} and {i + 1} make {2 * i + 1}.\n" for i in range(200)))
    return path


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process that sees whole batches."""
    out = tmp_path_factory.mktemp("alone")
    torchrun(1, "examples/train_parallel.py", "--text", text, "--out", out, *TINY)
    return out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_imports_public_names_only(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < LINES
    assert not [line for line in lines if "linattn._" in line or "import _" in line]


def test_quickstart() -> None:
    printed = run(sys.executable, "examples/quickstart.py")
    assert "quadratic" in printed
    assert float(printed.splitlines()[-1].rpartition(" ")[2]) < 1e-4


def test_drop_in_learns_with_both_kernels() -> None:
    losses = dict(line.split(": loss ") for line in run(sys.executable, "examples/drop_in.py").splitlines())
    assert losses.keys() == {"softmax", "quadratic"}
    assert all(float(loss) < 2.5 for loss in losses.values())  # log 16 = 2.77 is a guess


def test_decode_in_constant_memory() -> None:
    *sizes, same = run(sys.executable, "examples/decode.py").splitlines()
    assert len({line.partition("holds")[2] for line in sizes[-2:]}) == 1
    assert same.endswith("True")


def test_a_llama_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("the argument cache is called past_key_values before transformers 5.24")
    assert "generated (2, 32)" in run(sys.executable, "examples/hf.py")


@pytest.mark.torchrun
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_trains(mode: str, text: Path, alone: Path, tmp_path: Path) -> None:
    torchrun(2, "examples/train_parallel.py", "--text", text, "--mode", mode, "--out", tmp_path, *TINY)
    two, one = (torch.load(folder / "model.pt") for folder in (tmp_path, alone))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["losses"][-1] < two["losses"][0]
    assert two["model"].keys() == one["model"].keys()
    for name, weight in two["model"].items():
        assert torch.allclose(weight, one["model"][name], atol=1e-4), name


@pytest.mark.torchrun
def test_a_sequence_in_slices() -> None:
    printed = torchrun(2, "examples/sequence_parallel.py", "--length", "512", "--head-size", "16")
    assert printed.startswith("2 ranks, 512 positions")
