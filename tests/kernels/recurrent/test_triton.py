"""The recurrence on the Triton kernels, on a GPU or in the interpreter, against the plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linattn.errors import DoubleBackwardError
from linattn.kernels.recurrent.contract import CELLS
from linattn.recurrence import recur
from linattn.testing import relative_error
from tests.support.recurrent_calls import assert_nan_goes_nowhere, drawn, everything
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]
# Of outputs and gradients. In 16 bits z, h and every saved number are rounded, step by step.
LIMITS = {torch.float32: (2e-6, 5e-6), torch.bfloat16: (2e-2, 3e-2), torch.float16: (3e-3, 5e-3)}


def on_device(cell: str, B: int, T: int, H: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE, dtype) for x in drawn(cell, B, T, H))


def assert_true(tensors: tuple[Tensor, ...], cell: str, lengths: Tensor | None = None, read: str = "both") -> None:
    found = everything(tensors, cell, "triton", lengths, read)
    truth = everything(tensors, cell, "reference", lengths, read)
    forward, gradient = LIMITS[tensors[0].dtype]
    for index, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert ours.isfinite().all()
        assert ours.dtype == tensors[0].dtype
        limit = forward if index < len(found) - len(tensors) else gradient
        assert relative_error(ours, true, floor=1e-6) <= limit, index


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_and_dtype(cell: str, dtype: torch.dtype) -> None:
    assert_true(on_device(cell, 3, 5, 20, dtype), cell)


@pytest.mark.parametrize("read", ["both", "all", "last"])
@pytest.mark.parametrize("cell", CELLS)
def test_padded_batches_and_what_is_read(cell: str, read: str) -> None:
    assert_true(on_device(cell, 4, 6, 7), cell, torch.tensor([6, 1, 4, 3], device=DEVICE), read)
    assert_true(on_device(cell, 2, 3, 7), cell, read=read)


@pytest.mark.parametrize("cell", ["tanh", "lstm"])
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1, 1), (2, 2, 300), (5, 3, 256)])
def test_sizes_around_blocks(cell: str, B: int, T: int, H: int) -> None:
    assert_true(on_device(cell, B, T, H), cell)


@pytest.mark.parametrize("cell", ["relu", "lstm"])
def test_strided_inputs(cell: str) -> None:
    projected, *rest = on_device(cell, 3, 4, 9)
    assert_true((projected.transpose(0, 1).contiguous().transpose(0, 1), *rest), cell)
    every_other = [torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0] for x in (projected, *rest)]
    assert_true(tuple(every_other), cell)
    lengths = torch.tensor([4, 9, 1, 9, 3, 9], device=DEVICE)[::2]
    assert_true((projected, *rest), cell, lengths)


def test_saturated_gates() -> None:
    """exp of such sums overflows. Slopes such as 1 - g^2 are 0 there to the last digit of 1, and so far only."""
    projected, *rest = on_device("lstm", 3, 4, 6)
    tensors = (projected * 200, *rest)
    found, truth = (everything(tensors, "lstm", backend) for backend in ("triton", "reference"))
    for index, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert relative_error(ours, true, floor=1e-6 if index < 3 else 1.0) <= LIMITS[torch.float32][0], index


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_padding_and_in_another_sequence_goes_nowhere(cell: str) -> None:
    assert_nan_goes_nowhere(on_device(cell, 4, 5, 6), cell, "triton", torch.tensor([5, 1, 3, 2], device=DEVICE))


def test_a_second_derivative_is_refused() -> None:
    projected, weight, h0 = on_device("tanh", 2, 3, 4)
    projected.requires_grad_()
    all_h, _ = recur(projected, weight, (h0,), backend="triton")
    (gradient,) = torch.autograd.grad(all_h.square().sum(), projected, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="reference"):
        gradient.sum().backward()
