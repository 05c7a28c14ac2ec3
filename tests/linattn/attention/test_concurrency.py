"""Repeatability: the same bits again, from several threads at once, and after a fork."""

from __future__ import annotations

import multiprocessing
import pathlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import linattn
from linattn.testing import evaluate, make_inputs


def _everything(operation, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    outputs, gradients = evaluate(lambda *t: operation.run(*t, is_causal=True), tensors)
    return outputs + gradients


def test_the_same_bits_again(operation) -> None:
    tensors = make_inputs(keys=30 if operation.causal_only else 140, value_size=5, dtype=torch.float32)
    first = _everything(operation, tensors)
    for _ in range(3):
        for a, b in zip(first, _everything(operation, tensors), strict=True):
            assert torch.equal(a, b)


def test_the_same_bits_from_four_threads(operation) -> None:
    keys = 30 if operation.causal_only else 140
    work = [make_inputs(keys=keys + i, value_size=5, dtype=torch.float32, seed=i) for i in range(4)]
    alone = [_everything(operation, tensors) for tensors in work]
    start = threading.Barrier(4)

    def repeat(tensors: tuple[torch.Tensor, ...]) -> list[list[torch.Tensor]]:
        start.wait()
        return [_everything(operation, tensors) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(repeat, work))
    for expected, runs in zip(alone, together, strict=True):
        for run in runs:
            assert all(torch.equal(a, b) for a, b in zip(expected, run, strict=True))


def test_results_do_not_depend_on_the_neighbours_in_the_batch(operation) -> None:
    q, k, v = make_inputs(batch=5, keys=30, value_size=5, dtype=torch.float32)
    whole = operation.run(q, k, v, is_causal=True)
    alone = operation.run(q[3:4], k[3:4], v[3:4], is_causal=True)
    assert torch.allclose(whole[3:4], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_can_compute() -> None:
    """As in a data loader: the parent has used the operations, and its forked worker uses them on one thread."""
    program = """
import multiprocessing, torch, linattn
from linattn.testing import make_inputs
inputs = make_inputs(keys=200, dtype=torch.float32)
def compute():
    return [linattn.quadratic_attention(*inputs, is_causal=True, form=f).tolist() for f in ("direct", "chunked")]
torch.set_num_threads(1)
here = compute()
def work(queue):
    queue.put(compute() == here)
context = multiprocessing.get_context("fork")
queue = context.Queue()
worker = context.Process(target=work, args=(queue,))
worker.start()
assert queue.get(timeout=60)
worker.join()
"""
    root = pathlib.Path(linattn.__file__).resolve().parent.parent
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr
