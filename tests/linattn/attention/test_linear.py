"""Feature-map attention against the formula: named maps, callables and modules."""

from __future__ import annotations

import pytest
import torch

import linattn
from linattn.testing import (
    TRUE_FEATURE_MAPS,
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    relative_error,
    truth_linear,
)

FORMS = ("direct", "chunked", "recurrent")
NON_NEGATIVE = sorted(set(TRUE_FEATURE_MAPS) - {"identity"})


@pytest.mark.parametrize("feature_map", NON_NEGATIVE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_causal_equals_the_formula(form: str, feature_map: str, normalize: bool) -> None:
    q, k, v = make_inputs(keys=33 if form == "recurrent" else 150, value_size=5, dtype=torch.float32)
    options = {"feature_map": feature_map, "normalize": normalize, "is_causal": True}
    assert_close_to_truth(linattn.linear_attention(q, k, v, form=form, **options), truth_linear(q, k, v, **options))


@pytest.mark.parametrize("feature_map", NON_NEGATIVE)
@pytest.mark.parametrize("form", ["direct", "chunked"])
def test_over_all_keys_equals_the_formula(form: str, feature_map: str) -> None:
    q, k, v = make_inputs(queries=40, keys=150, value_size=5, dtype=torch.float32)
    out = linattn.linear_attention(q, k, v, feature_map=feature_map, form=form)
    assert_close_to_truth(out, truth_linear(q, k, v, feature_map=feature_map))


@pytest.mark.parametrize("form", FORMS)
def test_identity_is_unnormalised_linear_attention(form: str) -> None:
    q, k, v = make_inputs(keys=40)
    out = linattn.linear_attention(q, k, v, feature_map="identity", normalize=False, is_causal=True, form=form)
    assert_close_to_truth(out, ((q @ k.mT).tril() @ v))


def test_elu_plus_one_is_the_default() -> None:
    q, k, v = make_inputs()
    assert torch.equal(linattn.linear_attention(q, k, v), linattn.linear_attention(q, k, v, feature_map="elu+1"))


@pytest.mark.parametrize("form", FORMS)
def test_scale_cancels_when_normalised_and_multiplies_when_not(form: str) -> None:
    q, k, v = make_inputs(keys=40)
    options = {"is_causal": True, "form": form}
    plain = linattn.linear_attention(q, k, v, **options)
    assert relative_error(linattn.linear_attention(q, k, v, scale=0.3, **options), plain) < 1e-12
    plain = linattn.linear_attention(q, k, v, normalize=False, **options)
    scaled = linattn.linear_attention(q, k, v, normalize=False, scale=0.3, **options)
    assert relative_error(scaled, 0.3 * plain) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_callable_may_change_the_number_of_features(form: str) -> None:
    def phi(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.exp(), (-x).exp(), x * x], dim=-1)

    q, k, v = make_inputs(keys=40, head_size=6, value_size=5)
    for options in ({"is_causal": True}, {"is_causal": True, "normalize": False}):
        assert_matches_truth(
            lambda q, k, v, o=options: linattn.linear_attention(q, k, v, feature_map=phi, form=form, **o),
            lambda q, k, v, o=options: truth_linear(q, k, v, feature_map=phi, **o),
            (q, k, v),
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_module_is_trained_through_the_operation(form: str) -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(6, 9, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.softplus(self.project(x))

    phi = Learned()
    q, k, v = make_inputs(keys=40, head_size=6, value_size=5)
    gradients = []
    for function in (
        lambda *t: linattn.linear_attention(*t, feature_map=phi, is_causal=True, form=form),
        lambda *t: truth_linear(*t, feature_map=phi, is_causal=True),
    ):
        out = function(q, k, v)
        upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        gradients.append(torch.autograd.grad(out, list(phi.parameters()), upstream))
    for actual, truth in zip(*gradients, strict=True):
        assert_close_to_truth(actual, truth, gradient=True, what="gradient of a parameter of phi")


def test_a_query_whose_features_are_all_zero_gives_zero_and_no_gradient() -> None:
    q, k, v = make_inputs(keys=20, dtype=torch.float32)
    q[:, :, 3] = -1.0
    for form in FORMS:
        outputs, (dq, dk, dv) = evaluate(
            lambda *t, form=form: linattn.linear_attention(*t, feature_map="relu", is_causal=True, form=form), (q, k, v)
        )
        assert torch.equal(outputs[0][:, :, 3], torch.zeros_like(outputs[0][:, :, 3]))
        assert torch.equal(dq[:, :, 3], torch.zeros_like(dq[:, :, 3]))
        assert dk.isfinite().all()
        assert dv.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_elu_plus_one_keeps_its_digits_far_below_zero(form: str) -> None:
    """elu(x) + 1 is exp(x) there; adding 1 to its rounded difference from 1 would leave nothing at x = -18."""
    q, k, v = make_inputs(keys=40, dtype=torch.float32)
    k = k - 18
    out = linattn.linear_attention(q, k, v, is_causal=True, form=form)
    assert_close_to_truth(out, truth_linear(q, k, v, is_causal=True))
