"""The public operations on a CUDA device, held against the same float64 truths as on the CPU. `make gpu` runs these."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import linattn
from linattn import testing
from linattn.errors import DeviceError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"

OPERATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "softmax": (linattn.softmax_attention, testing.truth_softmax),
    "quadratic-direct": (partial(linattn.quadratic_attention, form="direct"), testing.truth_quadratic),
    "quadratic-chunked": (partial(linattn.quadratic_attention, form="chunked"), testing.truth_quadratic),
    "linear-direct": (partial(linattn.linear_attention, form="direct"), testing.truth_linear),
    "linear-chunked": (partial(linattn.linear_attention, form="chunked"), testing.truth_linear),
}


@pytest.mark.parametrize("dtype", testing.BUDGETS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_and_gradients_on_the_device(name: str, is_causal: bool, dtype: torch.dtype) -> None:
    operation, truth = OPERATIONS[name]
    inputs = testing.make_inputs(keys=129, head_size=16, value_size=24, dtype=dtype, device=DEVICE, layout="transposed")
    testing.assert_matches_truth(partial(operation, is_causal=is_causal), partial(truth, is_causal=is_causal), inputs)


def test_decoding_step_by_step_on_the_device_equals_the_whole() -> None:
    q, k, v = testing.make_inputs(keys=20, dtype=torch.float32, device=DEVICE)
    step = partial(linattn.quadratic_attention, is_causal=True, return_state=True)
    state, steps = None, []
    for i in range(20):
        out, state = step(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], initial_state=state)
        steps.append(out)
    testing.assert_close_to_truth(torch.cat(steps, dim=2), testing.truth_quadratic(q, k, v, is_causal=True))


def test_inputs_on_two_devices_are_refused() -> None:
    q, k, v = testing.make_inputs(device=DEVICE)
    with pytest.raises(DeviceError, match="cuda"):
        linattn.quadratic_attention(q, k.cpu(), v)
