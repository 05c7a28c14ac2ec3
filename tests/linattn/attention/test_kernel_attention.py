"""Attention by any similarity, Eq. 6: the general case contains the named ones and trains what is inside `sim`."""

from __future__ import annotations

import pytest
import torch

import linattn
from linattn.errors import ArgumentError
from linattn.testing import (
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    relative_error,
    truth_attention,
    truth_quadratic,
    truth_softmax,
)


def _square(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (1 + q @ k.mT) ** 2


def _gaussian(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.exp(-(torch.cdist(q, k) ** 2))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [1, 33, 300])
def test_equals_the_formula(is_causal: bool, keys: int) -> None:
    q, k, v = make_inputs(keys=keys, value_size=5)
    for sim in (_square, _gaussian):
        out = linattn.kernel_attention(q, k, v, sim=sim, is_causal=is_causal)
        assert_close_to_truth(out, truth_attention(q, k, v, sim, is_causal=is_causal))


def test_contains_softmax_and_quadratic() -> None:
    q, k, v = make_inputs(keys=150, head_size=16)
    by_exp = linattn.kernel_attention(q, k, v, sim=lambda q, k: torch.exp(q @ k.mT / 4), is_causal=True)
    assert_close_to_truth(by_exp, truth_softmax(q, k, v, is_causal=True))
    by_square = linattn.kernel_attention(q, k, v, sim=_square)
    assert_close_to_truth(by_square, truth_quadratic(q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [2, 63, 300])
def test_gradients(is_causal: bool, keys: int) -> None:
    q, k, v = make_inputs(keys=keys, value_size=5)
    assert_matches_truth(
        lambda *t: linattn.kernel_attention(*t, sim=_gaussian, is_causal=is_causal),
        lambda *t: truth_attention(*t, _gaussian, is_causal=is_causal),
        (q, k, v),
    )


def test_queries_and_keys_may_differ_in_number() -> None:
    q, k, v = make_inputs(queries=7, keys=300, value_size=5)
    out = linattn.kernel_attention(q, k, v, sim=_gaussian)
    assert_close_to_truth(out, truth_attention(q, k, v, _gaussian))


@pytest.mark.parametrize("is_causal", [False, True])
def test_parameters_inside_sim_get_gradients(is_causal: bool) -> None:
    q, k, v = make_inputs(keys=300, value_size=5)
    mixing = torch.nn.Parameter(0.3 * torch.randn(8, 8, dtype=torch.float64))
    sharpness = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def sim(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.exp(sharpness * (q @ mixing @ k.mT))

    gradients = []
    for out in (
        linattn.kernel_attention(q, k, v, sim=sim, is_causal=is_causal),
        truth_attention(q, k, v, sim, is_causal=is_causal),
    ):
        upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        gradients.append(torch.autograd.grad(out, (mixing, sharpness), upstream))
    for actual, truth in zip(*gradients, strict=True):
        assert_close_to_truth(actual, truth, gradient=True, what="gradient of a parameter of sim")


def test_a_zero_denominator_is_zero_and_has_no_gradient() -> None:
    q, k, v = make_inputs(keys=20)
    q[:, :, 3] = -5.0
    k.abs_()

    def sim(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).relu()

    (out,), (dq, dk, dv) = evaluate(lambda *t: linattn.kernel_attention(*t, sim=sim), (q, k, v))
    assert torch.equal(out[:, :, 3], torch.zeros_like(out[:, :, 3]))
    assert torch.equal(dq[:, :, 3], torch.zeros_like(dq[:, :, 3]))
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_low_precision_sums_are_kept_in_float32() -> None:
    """Only `sim` itself is computed in the dtype of the inputs."""
    q, k, v = make_inputs(keys=500, dtype=torch.bfloat16)
    out = linattn.kernel_attention(q, k, v, sim=_square, is_causal=True)
    assert out.dtype == torch.bfloat16
    truth = truth_quadratic(q, k, v, is_causal=True)
    rounded_sims = truth_attention(q, k, v, lambda q, k: _square(q.bfloat16(), k.bfloat16()).double(), is_causal=True)
    assert relative_error(out, truth) <= relative_error(rounded_sims.bfloat16(), truth) * 1.2


def test_a_negative_similarity_is_refused() -> None:
    q, k, v = make_inputs()
    with pytest.raises(ArgumentError, match="non-negative"):
        linattn.kernel_attention(q, k, v, sim=lambda q, k: q @ k.mT)
