"""Where states of the quadratic form lose digits, and that Triton's chunked form then does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.kernels.common.op.stateful import ForwardInputs, Plan
from linattn.kernels.quadratic.contract import Options
from linattn.testing import assert_matches_truth, condition_number, make_key_mask, row_errors, truth_quadratic
from tests.support.quadratic_calls import DTYPES, chunked, inputs, state_of, truth
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]


def near_minus_one(spread: float, **how: Any) -> list[Tensor]:
    """All scores are -1 but for about `spread`: what the sums add up to has cancelled."""
    q, k, v = inputs(dtype=torch.float64, **how)
    direction = torch.nn.functional.normalize(q[:1, :1, :1], dim=-1)
    return [spread * q - direction, spread * k + direction, v]


def cancelled_queries(*arguments: Any, **options: Any) -> int:
    """How many queries of a call compute all of their scores, since a state would lose their digits."""
    from linattn.kernels.quadratic.gpu import launch

    how = Options(True, 0, 1.0, 1.0, 2.0, 1.0, True)._replace(**options)
    _, _, _, saved = launch.forward(
        ForwardInputs(*arguments, None, None, [], how, False, True, Plan("chunked", "triton"))
    )
    return int(saved[0].sum())


CROWDED = [
    (torch.float32, {"keys": 70}, {"is_causal": True}),
    (torch.bfloat16, {"keys": 70, "heads": 4, "kv_heads": 2, "batch": 2}, {"is_causal": True}),
    (torch.bfloat16, {"keys": 50, "head_size": 20, "value_size": 33}, {"is_causal": False}),
    (torch.float16, {"keys": 70}, {"is_causal": True, "q_offset": 7}),
]


@pytest.mark.parametrize(("dtype", "how", "options"), CROWDED, ids=str)
def test_truth_where_all_scores_are_near_minus_one(dtype: torch.dtype, how: Any, options: Any) -> None:
    """A state would lose all digits of bf16, most of fp32, so these queries compute their scores."""
    x = [t.to(dtype) for t in near_minus_one(0.05, **how)]
    assert cancelled_queries(*x, **options) > 20
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), x)


@pytest.mark.parametrize("is_causal", [True, False])
def test_some_queries_near_minus_one_among_packed_and_masked_ones(is_causal: bool) -> None:
    """Only some queries of a tile, of one sequence, with masked keys before them."""
    cu_seqlens = torch.tensor([0, 45, 50, 130], device=DEVICE, dtype=torch.int32)
    q, k, v = inputs(dtype=torch.float64, keys=130, heads=2, kv_heads=1)
    crowded = near_minus_one(0.03, keys=130, heads=2, kv_heads=1)
    q[:, :, 100:119], k[:, :, 50:] = crowded[0][:, :, 100:119], crowded[1][:, :, 50:]
    mask = make_key_mask(1, 130, keep=0.8).to(DEVICE)
    options = {"is_causal": is_causal, "cu_seqlens": cu_seqlens, "key_mask": mask}
    x = [t.bfloat16() for t in (q, k, v)]
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), x)


def test_queries_orthogonal_to_all_keys() -> None:
    """s^2 vanishes in directions that no axis shows: no term of the row sum is large, only what it is summed from."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 70, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    rotation = torch.linalg.qr(k[0, 0, :16])[0]
    q[..., :8], k[..., 8:] = 0.02 * q[..., :8], 0
    x = [t.to(DEVICE, torch.bfloat16) for t in (q @ rotation, k @ rotation, v)]
    options = {"is_causal": True, "coefficients": (0, 0, 1)}
    assert_matches_truth(chunked(**options), truth(**options), x)
    assert cancelled_queries(*x, c0=0.0, c1=0.0) > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_query_of_plain_inputs_is_cancelled(dtype: torch.dtype) -> None:
    assert cancelled_queries(*inputs(dtype=dtype, keys=130)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_where_the_keys_of_a_state_were_near_minus_one(dtype: torch.dtype) -> None:
    """They are gone, so the error grows with kappa, as the reference's does."""
    x = [t.to(dtype) for t in near_minus_one(0.05, keys=96)]
    state = state_of(*(t[:, :, :60] for t in x[1:]))
    rest = [t[:, :, 60:] for t in x]
    out = chunked(is_causal=True, initial_state=state)(*rest)
    errors = row_errors(out, truth_quadratic(*x, is_causal=True)[:, :, 60:], x[2])
    kappa = condition_number(*x[:2], is_causal=True)[:, :, 60:]
    assert kappa.median() > 50
    assert (errors <= 4 * torch.finfo(dtype).eps * kappa).all()


def test_fp16_scores_whose_squares_leave_its_range() -> None:
    q, k, v = inputs(dtype=torch.float64, keys=70, positive=True)
    x = [t.half() for t in (24 * q, 24 * k, v)]
    scores = (x[0].double() @ x[1].double().mT).abs()
    assert scores.max() > 300
    assert_matches_truth(chunked(is_causal=True), truth(is_causal=True), x)


def test_sums_far_from_zero_keep_their_digits() -> None:
    """All keys and values alike: sums grow with N and every term weighs the same."""
    q, k, v = inputs(dtype=torch.float32, keys=130, positive=True)
    assert_matches_truth(chunked(is_causal=True), truth(is_causal=True), (q, k, v + 3))


def test_results_repeat_bit_by_bit() -> None:
    x = [t.requires_grad_() for t in inputs(dtype=torch.bfloat16, keys=40, heads=2, kv_heads=1)]
    runs = []
    for _ in range(2):
        out = chunked(is_causal=True, enable_gqa=True)(*x)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
