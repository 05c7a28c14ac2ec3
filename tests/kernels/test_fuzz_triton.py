"""A fixed number of random calls on the Triton kernels, on a GPU or in the interpreter; `linattn fuzz --backend triton`
goes on from there."""

from __future__ import annotations

import pytest

from linattn._dispatch import plan
from linattn.testing import fuzz
from linattn.testing.random_calls import OPS
from tests.support.triton_device import CUDA, DEVICE, NEEDS_TRITON

EXTENT, SEEDS = ("medium", 60) if CUDA else ("tiny", 14)
pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op: str) -> None:
    if "triton" not in plan.BACKENDS[op]:
        pytest.skip(f"no Triton kernels for {op}")
    tally = fuzz.Tally()
    for seed in range(SEEDS):
        tally.add(op, seed, "triton", EXTENT, DEVICE)
    assert not tally.failed, str(tally)
    assert tally.passed[op] >= SEEDS / 2, str(tally)
