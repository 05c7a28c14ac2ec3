"""Recurrent states: their canonical layout, continuing from them, and gradients that pass through them."""

from __future__ import annotations

import itertools

import pytest
import torch

import linattn
from linattn.errors import ArgumentError
from linattn.states import FeatureMapState, QuadraticState
from linattn.testing import (
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    make_key_mask,
    truth_feature_state,
    truth_linear,
    truth_quadratic,
    truth_quadratic_state,
)

FORMS = ("direct", "chunked", "recurrent")


def _cut(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bounds: int) -> list[tuple[torch.Tensor, ...]]:
    edges = [0, *bounds, k.shape[2]]
    return [tuple(t[:, :, a:b] for t in (q, k, v)) for a, b in itertools.pairwise(edges)]


def _assert_states_equal(state, truth) -> None:
    assert len(state) == len(truth)
    assert state.n.dtype == torch.int64
    assert torch.equal(state.n, truth[0])
    for name, actual, expected in zip(state._fields[1:], state[1:], truth[1:], strict=True):
        assert_close_to_truth(actual, expected, what=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [1, 5, 70])
def test_the_quadratic_state_is_canonical(form: str, keys: int) -> None:
    """Neither scale nor coefficients nor normalisation enter it, and pair (a, b) of kkv lies at a(a+1)/2 + b."""
    q, k, v = make_inputs(heads=4, kv_heads=2, keys=keys, head_size=5, value_size=3)
    for options in ({}, {"scale": 0.3, "coefficients": (1, 1, 0.5)}, {"normalize": False}):
        _, state = linattn.quadratic_attention(
            q, k, v, is_causal=True, enable_gqa=True, form=form, return_state=True, **options
        )
        assert isinstance(state, QuadraticState)
        assert state._fields == ("n", "k_sum", "kk", "v_sum", "kv", "kkv")
        assert state.kkv.shape == (2, 2, 15, 3)
        _assert_states_equal(state, truth_quadratic_state(k, v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("feature_map", ["elu+1", "exp"])
def test_the_feature_map_state_is_canonical(form: str, feature_map: str) -> None:
    q, k, v = make_inputs(heads=4, kv_heads=2, keys=40, head_size=5, value_size=3)
    for options in ({}, {"scale": 0.3}, {"normalize": False}):
        _, state = linattn.linear_attention(
            q, k, v, feature_map=feature_map, is_causal=True, enable_gqa=True, form=form, return_state=True, **options
        )
        assert isinstance(state, FeatureMapState)
        assert state._fields == ("n", "f_sum", "fv")
        _assert_states_equal(state, truth_feature_state(k, v, feature_map=feature_map))


@pytest.mark.parametrize("form", ["direct", "chunked"])
def test_the_state_of_a_call_over_all_keys_is_the_same(form: str) -> None:
    q, k, v = make_inputs(queries=3, keys=40, head_size=5, value_size=3)
    _, state = linattn.quadratic_attention(q, k, v, form=form, return_state=True)
    _assert_states_equal(state, truth_quadratic_state(k, v))
    _, state = linattn.linear_attention(q, k, v, form=form, return_state=True)
    _assert_states_equal(state, truth_feature_state(k, v))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_states_are_kept_in_float32_or_better(dtype: torch.dtype, kept: torch.dtype) -> None:
    q, k, v = make_inputs(dtype=dtype)
    for function in (linattn.quadratic_attention, linattn.linear_attention):
        out, state = function(q, k, v, is_causal=True, return_state=True)
        assert out.dtype == dtype
        assert {t.dtype for t in state[1:]} == {kept}
        again, _ = function(q, k, v, is_causal=True, initial_state=state, return_state=True)
        assert again.dtype == dtype


@pytest.mark.parametrize("bounds", [(1,), (20,), (1, 2, 35), (17, 18)])
def test_pieces_equal_the_whole(stateful, bounds: tuple[int, ...]) -> None:
    q, k, v = make_inputs(heads=4, kv_heads=2, keys=40, head_size=6, value_size=5)
    whole, final = stateful.run(q, k, v, is_causal=True, enable_gqa=True, return_state=True)
    state, outputs = None, []
    for part in _cut(q, k, v, *bounds):
        out, state = stateful.run(*part, is_causal=True, enable_gqa=True, initial_state=state, return_state=True)
        outputs.append(out)
    assert_close_to_truth(torch.cat(outputs, dim=2), whole)
    _assert_states_equal(state, final)


def test_a_state_passes_between_forms_and_options() -> None:
    """Continue with another form what one leaves; scale and coefficients are applied on reading."""
    q, k, v = make_inputs(keys=90, head_size=6, value_size=5)
    (q0, k0, v0), (q1, k1, v1) = _cut(q, k, v, 50)
    options = {"is_causal": True, "scale": 0.6, "coefficients": (1, 1, 0.5)}
    truth = truth_quadratic(q, k, v, **options)[:, :, 50:]
    for before in FORMS:
        _, state = linattn.quadratic_attention(q0, k0, v0, is_causal=True, form=before, return_state=True)
        for after in FORMS:
            out = linattn.quadratic_attention(q1, k1, v1, initial_state=state, form=after, **options)
            assert_close_to_truth(out, truth, what=f"{before} then {after}")


def test_a_hand_made_state_is_accepted() -> None:
    q, k, v = make_inputs(keys=30)
    past_k, past_v = (t.clone() for t in make_inputs(keys=11, seed=9)[1:])
    out = linattn.quadratic_attention(
        q, k, v, is_causal=True, initial_state=QuadraticState(*truth_quadratic_state(past_k, past_v))
    )
    assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True, past=(past_k, past_v)))
    out = linattn.linear_attention(
        q, k, v, is_causal=True, initial_state=FeatureMapState(*truth_feature_state(past_k, past_v))
    )
    assert_close_to_truth(out, truth_linear(q, k, v, is_causal=True, past=(past_k, past_v)))


@pytest.mark.parametrize("form", ["direct", "chunked"])
def test_without_causality_every_query_sees_the_state_and_all_keys(form: str) -> None:
    q, k, v = make_inputs(queries=7, keys=40, value_size=5)
    past = make_inputs(keys=21, value_size=5, seed=9)[1:]
    state = QuadraticState(*truth_quadratic_state(*past))
    out, after = linattn.quadratic_attention(q, k, v, initial_state=state, return_state=True, form=form)
    assert_close_to_truth(out, truth_quadratic(q, k, v, past=past))
    joined = [torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True)]
    _assert_states_equal(after, truth_quadratic_state(*joined))
    state = FeatureMapState(*truth_feature_state(*past))
    out = linattn.linear_attention(q, k, v, initial_state=state, form=form)
    assert_close_to_truth(out, truth_linear(q, k, v, past=past))


def test_the_recurrent_form_is_causal() -> None:
    q, k, v = make_inputs()
    for function in (linattn.quadratic_attention, linattn.linear_attention):
        with pytest.raises(ArgumentError, match="recurrent"):
            function(q, k, v, form="recurrent")


@pytest.mark.parametrize("past_keys", [1, 20])
def test_gradients_pass_through_the_initial_state(stateful, past_keys: int) -> None:
    """The truth prepends the real keys, so the gradient reaches them through every field of the state."""
    q, k, v = make_inputs(keys=25, head_size=6, value_size=5)
    past_k, past_v = make_inputs(keys=past_keys, head_size=6, value_size=5, seed=9)[1:]

    def in_two_calls(q, k, v, past_k, past_v):
        _, state = stateful.run(past_k, past_k, past_v, is_causal=True, return_state=True)
        return stateful.run(q, k, v, is_causal=True, initial_state=state)

    def truth(q, k, v, past_k, past_v):
        return stateful.truth(q, k, v, is_causal=True, past=(past_k, past_v))

    assert_matches_truth(
        in_two_calls, truth, (q, k, v, past_k, past_v), names=("q", "k", "v", "earlier keys", "earlier values")
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_pass_through_the_returned_state(stateful, is_causal: bool) -> None:
    if stateful.causal_only and not is_causal:
        pytest.skip("this form is causal only")
    q, k, v = make_inputs(keys=70, head_size=6, value_size=5)
    quadratic = stateful.truth is truth_quadratic

    def run(q, k, v):
        out, state = stateful.run(q, k, v, is_causal=is_causal, return_state=True)
        return out, *state[1:]

    def truth(q, k, v):
        state = truth_quadratic_state(k, v) if quadratic else truth_feature_state(k, v)
        return stateful.truth(q, k, v, is_causal=is_causal), *state[1:]

    assert_matches_truth(run, truth, (q, k, v))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_state_fields_themselves(form: str) -> None:
    """The loss reaches each field; the truth is the polynomial read of the state, written out."""
    q, k, v = make_inputs(queries=1, keys=1, batch=1, heads=1, head_size=3, value_size=2)
    past = make_inputs(batch=1, heads=1, keys=6, head_size=3, value_size=2, seed=9)[1:]
    n, *fields = truth_quadratic_state(*past)
    c0, c1, c2, scale = 1.0, 0.8, 0.6, 0.7

    def run(*fields):
        return linattn.quadratic_attention(
            q,
            k,
            v,
            is_causal=True,
            initial_state=QuadraticState(n, *fields),
            coefficients=(c0, c1, c2),
            scale=scale,
            form=form,
        )

    def truth(k_sum, kk, v_sum, kv, kkv):
        x = scale * q[0, 0, 0]
        pairs = torch.stack([(2 if a > b else 1) * x[a] * x[b] for a in range(3) for b in range(a + 1)])
        s = x @ k[0, 0, 0]
        weight = c0 + c1 * s + c2 * s * s
        top = c0 * v_sum[0, 0] + c1 * x @ kv[0, 0] + c2 * pairs @ kkv[0, 0] + weight * v[0, 0, 0]
        bottom = c0 * n[0] + c1 * x @ k_sum[0, 0] + c2 * x @ kk[0, 0] @ x + weight
        return (top / bottom)[None, None, None]

    assert_matches_truth(run, truth, fields, names=("k_sum", "kk", "v_sum", "kv", "kkv"))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_have_a_state_each(stateful, index_dtype: torch.dtype) -> None:
    """An empty sequence passes its state through."""
    q, k, v = make_inputs(batch=1, heads=4, kv_heads=2, keys=50, head_size=6, value_size=5)
    bounds = torch.tensor([0, 13, 13, 14, 50], dtype=index_dtype)
    past = make_inputs(batch=4, heads=2, keys=9, head_size=6, value_size=5, seed=9)[1:]
    quadratic = stateful.truth is truth_quadratic
    collect, kind = (truth_quadratic_state, QuadraticState) if quadratic else (truth_feature_state, FeatureMapState)
    start = kind(*collect(*past))
    options = {"is_causal": True, "cu_seqlens": bounds}
    out, state = stateful.run(q, k, v, enable_gqa=True, initial_state=start, return_state=True, **options)
    assert_close_to_truth(out, stateful.truth(q, k, v, past=past, **options))
    added = collect(k, v, cu_seqlens=bounds)
    _assert_states_equal(state, [a + b for a, b in zip(start, added, strict=True)])
    for field, before in zip(state, start, strict=True):
        assert torch.equal(field[1], before[1])


def test_masked_keys_do_not_enter_the_state(stateful) -> None:
    q, k, v = make_inputs(keys=40, head_size=6, value_size=5)
    mask = make_key_mask(2, 40)
    collect = truth_quadratic_state if stateful.truth is truth_quadratic else truth_feature_state
    _, state = stateful.run(q, k, v, is_causal=True, key_mask=mask, return_state=True)
    _assert_states_equal(state, collect(k, v, key_mask=mask))


@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_state_is_a_start_like_any_other(masked: bool) -> None:
    """Its sums are zero, and the gradient with respect to them is the same in every form."""
    q, k, v = make_inputs(keys=40, head_size=5, value_size=3)
    mask = make_key_mask(2, 40) if masked else None
    n, *fields = QuadraticState.empty(2, 2, 5, 3, dtype=torch.float64)
    results = [
        evaluate(
            lambda *t, form=form: linattn.quadratic_attention(
                q, k, v, is_causal=True, key_mask=mask, initial_state=QuadraticState(n, *t), form=form
            ),
            fields,
        )
        for form in FORMS
    ]
    truth = truth_quadratic(q, k, v, is_causal=True, key_mask=mask)
    for (out,), gradients in results:
        assert_close_to_truth(out, truth)
        for actual, expected in zip(gradients, results[0][1], strict=True):
            assert_close_to_truth(actual, expected, gradient=True)


def test_the_initial_state_is_left_as_it_was(stateful) -> None:
    q, k, v = make_inputs(keys=40)
    _, state = stateful.run(q, k, v, is_causal=True, return_state=True)
    before = [t.clone() for t in state]
    stateful.run(q, k, v, is_causal=True, initial_state=state, return_state=True)
    assert all(torch.equal(t, b) for t, b in zip(state, before, strict=True))
