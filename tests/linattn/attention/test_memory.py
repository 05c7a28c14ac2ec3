"""Peak memory of forward and backward grows with N, not with its square, and never holds N x C features."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import linattn

ROOT = pathlib.Path(linattn.__file__).resolve().parent.parent

# Every tensor gets its own mapping, so that what is freed leaves at once: the peak is of live memory, not of what the
# allocator keeps in a fragmented heap.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# Runs in a child: the kernel resets its own high-water mark before each length, so what the parent or an earlier length
# held does not count. The first, short call pays for libraries and thread pools.
PROGRAM = """
import ctypes, gc, json, sys
import torch, linattn
torch.set_num_threads(1)
name, options, lengths = json.loads(sys.argv[1])
if name == "kernel_attention":
    options["sim"] = lambda q, k: torch.exp(q @ k.mT / 8)
def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
def step(n):
    q, k, v = (torch.randn(1, 1, n, 64).mul_(0.3).requires_grad_() for _ in range(3))
    getattr(linattn, name)(q, k, v, is_causal=True, **options).square().sum().backward()
    return q.grad.isfinite().all() and k.grad.isfinite().all() and v.grad.isfinite().all()
assert step(1024)
peaks = []
for n in lengths:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS:")
    assert step(n)
    peaks.append((kib("VmHWM:") - before) / 1024)
print(json.dumps(peaks))
"""


def _peaks(name: str, lengths: tuple[int, ...], **options: object) -> list[float]:
    """MiB above what was held before, at each length."""
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([name, options, lengths])],
        cwd=ROOT,
        env=os.environ | RETURN_FREED_MEMORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark from /proc")
@pytest.mark.parametrize(
    ("name", "options", "lengths"),
    [
        ("quadratic_attention", {"form": "chunked"}, (8192, 16384, 32768)),
        ("linear_attention", {"form": "chunked"}, (8192, 16384, 32768)),
        ("quadratic_attention", {"form": "direct"}, (8192, 16384, 32768)),
        ("softmax_attention", {"backend": "reference"}, (8192, 16384, 32768)),
        ("kernel_attention", {}, (2048, 4096, 8192)),
    ],
    ids=["quadratic chunked", "linear chunked", "quadratic direct", "softmax", "kernel"],
)
def test_grows_linearly(name: str, options: dict[str, str], lengths: tuple[int, ...]) -> None:
    peaks = _peaks(name, lengths, **options)
    # q, k, v, the output, its square, the upstream gradient and three gradients are 9 tensors of N x 64 float32.
    tensors = [9 * n * 64 * 4 / 2**20 for n in lengths]
    for n, peak, needed in zip(lengths, peaks, tensors, strict=True):
        assert peak < 1.5 * needed + 48, f"N={n}: {peak:.0f} MiB, of which {needed:.0f} MiB are inputs and outputs"
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    # When N doubles, a linear quantity grows by twice as much as before, and a quadratic one by four times.
    assert second < 3 * max(first, 4.0), f"peaks of {[round(p) for p in peaks]} MiB at {lengths}"
