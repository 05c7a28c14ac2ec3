"""A fixed number of random calls on the Triton kernels, on a GPU or in the interpreter; `linattn fuzz --backend triton`
goes on from there."""

from __future__ import annotations

import pytest
import torch

from linattn import dispatch, fuzz
from linattn.kernels.common.backend import INTERPRETED, TRITON_ABSENT
from linattn.random_calls import OPS

CUDA = torch.cuda.is_available()
DEVICE, EXTENT, SEEDS = ("cuda", "medium", 60) if CUDA else ("cpu", "tiny", 14)
pytestmark = [
    pytest.mark.skipif(bool(TRITON_ABSENT), reason=TRITON_ABSENT),
    pytest.mark.skipif(not CUDA and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op: str) -> None:
    if "triton" not in dispatch.BACKENDS[op]:
        pytest.skip(f"no Triton kernels for {op}")
    tally = fuzz.Tally()
    for seed in range(SEEDS):
        tally.add(op, seed, "triton", EXTENT, DEVICE)
    assert not tally.failed, str(tally)
    assert tally.passed[op] >= SEEDS / 2, str(tally)
