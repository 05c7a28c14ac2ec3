"""Fixtures that the tests of the kernels share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch

from linattn.kernels.common.op.backend import CAPABILITY, NATIVE_ABSENT
from linattn.testing import poisoned_memory


def pytest_report_header() -> str:
    return f"native kernels: {CAPABILITY}"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN."""
    with poisoned_memory():
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def concurrently() -> Callable[[Callable[[Any], Any], Sequence[Any]], list[list[Any]]]:
    """`concurrently(call, work)`: what a thread for each piece of work gets from five calls, all beginning together."""

    def run(call: Callable[[Any], Any], work: Sequence[Any]) -> list[list[Any]]:
        start = threading.Barrier(len(work))

        def repeat(one: Any) -> list[Any]:
            start.wait()
            return [call(one) for _ in range(5)]

        with ThreadPoolExecutor(len(work)) as pool:
            return list(pool.map(repeat, work))

    return run


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python <arguments>`, ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def in_a_process() -> Callable[..., str]:
    """`in_a_process(program)`: what a program prints."""

    def run(program: str) -> str:
        child = run_python("-c", program)
        assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
        return child.stdout

    return run


class Again(NamedTuple):
    """How tests ended in a process of their own: its exit status, how many passed, and on which instruction set."""

    status: int
    passed: int
    wanted: str
    used: str
    printed: str


def _instruction_sets() -> list[str]:
    if NATIVE_ABSENT:
        return []
    from linattn._native import capabilities

    return capabilities()


@pytest.fixture(params=_instruction_sets())
def again_on_an_instruction_set(request: pytest.FixtureRequest) -> Callable[[str], Again]:
    """For each instruction set of the machine, `again_on_an_instruction_set(chosen)` runs those tests of the file that
    `pytest -k chosen` selects on it; in a process of its own, since a process chooses once."""
    if "LINATTN_CPU_CAPABILITY" in os.environ:
        pytest.skip("this process has been given an instruction set")

    def again(chosen: str) -> Again:
        command = ("-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, str(request.path))
        child = run_python(*command, LINATTN_CPU_CAPABILITY=request.param)
        used = re.search(r"^native kernels: (.*)$", child.stdout, re.MULTILINE)
        passed = re.search(r" (\d+) passed", child.stdout)
        return Again(
            child.returncode,
            int(passed[1]) if passed else 0,
            request.param,
            used[1] if used else "",
            child.stdout[-3000:] + child.stderr[-3000:],
        )

    return again
