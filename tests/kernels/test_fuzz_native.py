"""A fixed number of random calls on the native kernels; `linattn fuzz --backend native` goes on from there."""

from __future__ import annotations

import pytest

from linattn._dispatch import plan
from linattn.kernels.common.op.backend import NATIVE_ABSENT
from linattn.testing import fuzz
from linattn.testing.random_calls import OPS

SEEDS = 120
pytestmark = pytest.mark.skipif(bool(NATIVE_ABSENT), reason=NATIVE_ABSENT)


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op: str) -> None:
    if "native" not in plan.BACKENDS[op]:
        pytest.skip(f"no native kernels for {op}")
    tally = fuzz.Tally()
    for seed in range(SEEDS):
        tally.add(op, seed, "native", "small", "cpu")
    assert not tally.failed, str(tally)
    assert tally.passed[op] >= SEEDS / 2, str(tally)
