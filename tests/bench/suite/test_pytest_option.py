"""`pytest --benchmark` measures and nothing else does, beside pytest-benchmark's own options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from linattn.bench.measuring.results import Results

ROOT = Path(__file__).resolve().parents[3]
# With `python -m` the checkout is imported from, whatever is installed.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYTEST, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_flag_measures_and_prints_the_table(tmp_path) -> None:
    chosen = "D16 and non-causal and (N256 or N1024)"
    found = run("--benchmark", "--benchmark-quick", f"--benchmark-out={tmp_path}", "-k", chosen)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "SDPA/this" in found.stdout
    assert "D=16 non-causal fp32: N*" in found.stdout
    assert "2 passed" in found.stdout
    measurements = Results.load(tmp_path / "results.json").measurements
    assert {measurement.problem.N for measurement in measurements} == {256, 1024}
    assert {measurement.method.name for measurement in measurements} == {
        "SDPA",
        "softmax",
        "quadratic direct",
        "quadratic chunked",
        "elu+1 chunked",
    }


@pytest.mark.parametrize("flag", [("--benchmark",), ("--benchmark-quick", "--benchmark-disable-gc")])
def test_flag_collects_benchmarks_only(flag) -> None:
    found = run(*flag, "--collect-only")
    collected = [line for line in found.stdout.splitlines() if "::" in line]
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(collected) > 20
    assert all(line.startswith("bench/suite/bench_") for line in collected)


def test_without_the_flag_nothing_is_measured() -> None:
    named = run("bench/suite/bench_attention.py")
    assert named.returncode == 0
    assert "skipped" in named.stdout
    assert "passed" not in named.stdout
    listed = run("--collect-only", "bench", "tests/bench/measuring/test_crossing.py")
    assert "test_crossing.py::" in listed.stdout
    assert "bench_attention.py" not in listed.stdout


def test_parallel_workers_are_refused() -> None:
    pytest.importorskip("xdist")
    found = run("--benchmark", "-n", "2")
    assert found.returncode == 4
    assert "drop -n" in found.stderr
