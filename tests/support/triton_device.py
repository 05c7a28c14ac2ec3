"""Where the Triton kernels are tested: on a GPU, or in the interpreter."""

import pytest
import torch

from linattn.kernels.common.op.backend import INTERPRETED, TRITON_ABSENT

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NEEDS_TRITON = [
    pytest.mark.skipif(bool(TRITON_ABSENT), reason=TRITON_ABSENT),
    pytest.mark.skipif(not CUDA and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1"),
]
"""Marks of a file of tests."""
