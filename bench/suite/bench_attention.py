"""Every operation beside SDPA, over N: run by `pytest --benchmark`."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from linattn.bench.measuring.cases import ELU_CHUNKED, QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SOFTMAX, Problem

if TYPE_CHECKING:
    import pytest

    from linattn.bench.suite.pytest_plugin import BenchmarkPlugin

METHODS = (SOFTMAX, QUADRATIC_DIRECT, QUADRATIC_CHUNKED, ELU_CHUNKED)
HEAD_SIZES = (16, 32, 64)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the problems: fewer and shorter ones with `--benchmark-quick`."""
    quick = metafunc.config.getoption("--benchmark-quick")
    sizes: tuple[int, ...]
    if metafunc.function is test_forward:
        sizes = (256, 1024, 2048, 4096, 8192) if quick else (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
        problems = [Problem(N, D, D, is_causal=c) for D, c, N in product(HEAD_SIZES, (False, True), sizes)]
    else:
        sizes = (1024,) if quick else (256, 512, 1024, 2048, 4096)
        problems = [
            Problem(N, D, D, is_causal=True, direction="training")
            for D, N in product((64,) if quick else HEAD_SIZES, sizes)
        ]
    metafunc.parametrize("problem", problems, ids=str)


def test_forward(problem: Problem, benchmarks: BenchmarkPlugin) -> None:
    """Measure the forward pass of every method on one problem."""
    benchmarks.check(problem, METHODS)


def test_training(problem: Problem, benchmarks: BenchmarkPlugin) -> None:
    """Measure forward and backward of every method on one problem."""
    benchmarks.check(problem, METHODS)
