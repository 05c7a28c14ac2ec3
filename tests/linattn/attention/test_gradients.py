"""Every gradient of every operation, at odd lengths, in every layout, against the derivative of the formula."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import linattn
from linattn.states import FeatureMapState, QuadraticState
from linattn.testing import (
    LAYOUTS,
    Layout,
    assert_matches_truth,
    make_inputs,
    make_key_mask,
    truth_feature_state,
    truth_linear,
    truth_quadratic,
    truth_quadratic_state,
)

LENGTHS = (1, 2, 15, 63, 129, 500)


def _skip_if_too_long(operation, keys: int) -> None:
    if operation.causal_only and keys > 63:
        pytest.skip("one step a token: covered by the shorter lengths")


@pytest.mark.parametrize("keys", LENGTHS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_at_odd_lengths(operation, keys: int, is_causal: bool) -> None:
    if operation.causal_only and not is_causal:
        pytest.skip("this form is causal only")
    _skip_if_too_long(operation, keys)
    q, k, v = make_inputs(keys=keys, head_size=7, value_size=5, batch=1, dtype=torch.float32)
    assert_matches_truth(
        lambda *t: operation.run(*t, is_causal=is_causal),
        lambda *t: operation.truth(*t, is_causal=is_causal),
        (q, k, v),
    )


@pytest.mark.parametrize(("head_size", "value_size"), [(1, 1), (1, 9), (16, 3), (3, 16), (33, 64)])
def test_at_unequal_head_sizes(operation, head_size: int, value_size: int) -> None:
    q, k, v = make_inputs(
        keys=30 if operation.causal_only else 75, head_size=head_size, value_size=value_size, dtype=torch.float32
    )
    assert_matches_truth(
        lambda *t: operation.run(*t, is_causal=True), lambda *t: operation.truth(*t, is_causal=True), (q, k, v)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(operation, layout: Layout) -> None:
    q, k, v = make_inputs(keys=35, heads=4, kv_heads=2, head_size=6, value_size=4, layout=layout, dtype=torch.float32)
    assert_matches_truth(
        lambda *t: operation.run(*t, is_causal=True, enable_gqa=True),
        lambda *t: operation.truth(*t, is_causal=True),
        (q, k, v),
    )


@pytest.mark.parametrize("form", ["direct", "chunked", "recurrent"])
@pytest.mark.parametrize(
    ("coefficients", "normalize"),
    [
        ((1, 1, 0.5), True),
        ((0, 0, 1), True),
        ((2.0, 1.0, 0.75), True),
        ((1, 2, 1), False),
        ((-1.0, 0.5, 0.25), False),
    ],
)
def test_with_other_coefficients(form: str, coefficients: tuple[float, float, float], normalize: bool) -> None:
    q, k, v = make_inputs(
        keys=33 if form == "recurrent" else 140, value_size=5, positive=coefficients[1] == 0, dtype=torch.float32
    )
    options = {"coefficients": coefficients, "normalize": normalize, "scale": 0.7, "is_causal": True}
    assert_matches_truth(
        lambda *t: linattn.quadratic_attention(*t, form=form, **options),
        lambda *t: truth_quadratic(*t, **options),
        (q, k, v),
    )


@pytest.mark.parametrize("feature_map", ["relu", "relu2", "exp", "identity"])
@pytest.mark.parametrize("form", ["direct", "chunked", "recurrent"])
def test_with_other_feature_maps(form: str, feature_map: str) -> None:
    q, k, v = make_inputs(keys=33 if form == "recurrent" else 140, value_size=5, dtype=torch.float32)
    for normalize in (True, False) if feature_map != "identity" else (False,):
        options = {"feature_map": feature_map, "normalize": normalize, "scale": 0.7, "is_causal": True}
        assert_matches_truth(
            lambda *t, o=options: linattn.linear_attention(*t, form=form, **o),
            lambda *t, o=options: truth_linear(*t, **o),
            (q, k, v),
        )


def test_only_the_gradients_asked_for(operation) -> None:
    """Any subset of the inputs may be constants."""
    tensors = make_inputs(keys=30, value_size=5)
    together = [t.detach().requires_grad_() for t in tensors]
    upstream = torch.randn(2, 2, 30, 5, dtype=torch.float64)
    expected = torch.autograd.grad(operation.run(*together, is_causal=True), together, upstream)
    for wanted in ({0}, {1}, {2}, {0, 2}):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        operation.run(*leaves, is_causal=True).backward(upstream)
        for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
            if i in wanted:
                assert torch.allclose(leaf.grad, gradient, rtol=1e-12, atol=1e-12)
            else:
                assert leaf.grad is None


def test_an_upstream_gradient_of_stride_zero(operation) -> None:
    """`out.sum().backward()` hands back an expanded scalar."""
    tensors = make_inputs(keys=30, value_size=5)
    leaves = [t.detach().requires_grad_() for t in tensors]
    expanded = torch.autograd.grad(operation.run(*leaves, is_causal=True).sum(), leaves)
    dense = torch.autograd.grad(operation.run(*leaves, is_causal=True), leaves, torch.ones(2, 2, 30, 5).double())
    for a, b in zip(expanded, dense, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_numerically_in_full(operation, is_causal: bool) -> None:
    """Every entry of the Jacobian, by finite differences."""
    if operation.causal_only and not is_causal:
        pytest.skip("this form is causal only")
    q, k, v = (
        t.requires_grad_()
        for t in make_inputs(batch=1, heads=2, kv_heads=1, keys=9 if is_causal else 5, head_size=3, value_size=2)
    )
    mask = make_key_mask(1, k.shape[2], keep=0.8)
    assert gradcheck(
        lambda q, k, v: operation.run(q, k, v, is_causal=is_causal, enable_gqa=True, key_mask=mask), (q, k, v)
    )


def test_numerically_through_states(stateful) -> None:
    q, k, v = make_inputs(batch=1, heads=1, keys=4, head_size=3, value_size=2)
    past = make_inputs(batch=1, heads=1, keys=5, head_size=3, value_size=2, seed=9)[1:]
    quadratic = stateful.truth is truth_quadratic
    n, *fields = truth_quadratic_state(*past) if quadratic else truth_feature_state(*past)
    kind = QuadraticState if quadratic else FeatureMapState

    def run(q, k, v, *fields):
        out, state = stateful.run(q, k, v, is_causal=True, initial_state=kind(n, *fields), return_state=True)
        return out, *state[1:]

    assert gradcheck(run, [t.detach().requires_grad_() for t in (q, k, v, *fields)])


def test_numerically_at_length(operation) -> None:
    """Random projections of the Jacobian beyond one tile."""
    keys = 40 if operation.causal_only else 140
    q, k, v = (t.requires_grad_() for t in make_inputs(batch=1, heads=1, keys=keys, head_size=5, value_size=3))
    assert gradcheck(lambda q, k, v: operation.run(q, k, v, is_causal=True), (q, k, v), fast_mode=True)
