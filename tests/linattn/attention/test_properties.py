"""Check what must hold for any shape: forms agree, causality, symmetry, scaling and splitting."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import linattn
from linattn.testing import make_inputs, make_key_mask, relative_error

CLOSE = 1e-10

lengths = st.integers(1, 40) | st.integers(120, 140)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**16)
quadratics = st.sampled_from([(1, 2, 1), (1, 1, 0.5), (2.0, 1.0, 0.75)])


def _forms(name: str, *tensors: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    forms = ("direct", "chunked", "recurrent") if options["is_causal"] else ("direct", "chunked")
    return [getattr(linattn, name)(*tensors, form=form, **options) for form in forms]


@given(
    keys=lengths,
    head_size=sizes,
    value_size=sizes,
    group=st.integers(1, 3),
    seed=seeds,
    is_causal=st.booleans(),
    normalize=st.booleans(),
    masked=st.booleans(),
    coefficients=quadratics,
)
def test_the_forms_of_quadratic_attention_agree(
    keys: int,
    head_size: int,
    value_size: int,
    group: int,
    seed: int,
    is_causal: bool,
    normalize: bool,
    masked: bool,
    coefficients: tuple[float, float, float],
) -> None:
    q, k, v = make_inputs(
        batch=1, heads=2 * group, kv_heads=2, keys=keys, head_size=head_size, value_size=value_size, seed=seed
    )
    mask = make_key_mask(1, keys, seed=seed) if masked else None
    first, *others = _forms(
        "quadratic_attention",
        q,
        k,
        v,
        is_causal=is_causal,
        normalize=normalize,
        key_mask=mask,
        coefficients=coefficients,
        enable_gqa=True,
    )
    for other in others:
        assert relative_error(other, first) < CLOSE


@given(
    keys=lengths,
    head_size=sizes,
    value_size=sizes,
    seed=seeds,
    is_causal=st.booleans(),
    normalize=st.booleans(),
    feature_map=st.sampled_from(["elu+1", "exp", "relu2"]),
)
def test_the_forms_of_linear_attention_agree(
    keys: int, head_size: int, value_size: int, seed: int, is_causal: bool, normalize: bool, feature_map: str
) -> None:
    q, k, v = make_inputs(batch=1, keys=keys, head_size=head_size, value_size=value_size, seed=seed)
    first, *others = _forms(
        "linear_attention", q, k, v, is_causal=is_causal, normalize=normalize, feature_map=feature_map
    )
    for other in others:
        assert relative_error(other, first) < CLOSE


@given(keys=st.integers(2, 60), cut=st.integers(1, 59), seed=seeds)
def test_the_future_does_not_reach_the_past(operation, keys: int, cut: int, seed: int) -> None:
    cut = min(cut, keys - 1)
    q, k, v = make_inputs(batch=1, keys=keys, value_size=5, seed=seed)
    whole = operation.run(q, k, v, is_causal=True)
    prefix = operation.run(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], is_causal=True)
    assert relative_error(whole[:, :, :cut], prefix) < CLOSE
    k[:, :, cut:], v[:, :, cut:] = 1e3, -1e3
    assert torch.equal(operation.run(q, k, v, is_causal=True)[:, :, :cut], whole[:, :, :cut])


@given(seed=seeds, keys=st.integers(1, 50))
def test_batch_elements_and_heads_are_strangers(operation, seed: int, keys: int) -> None:
    q, k, v = make_inputs(batch=3, heads=4, keys=keys, value_size=5, seed=seed)
    out = operation.run(q, k, v, is_causal=True)
    generator = torch.Generator().manual_seed(seed)
    batch, heads = torch.randperm(3, generator=generator), torch.randperm(4, generator=generator)
    moved = operation.run(*(t[batch][:, heads] for t in (q, k, v)), is_causal=True)
    assert relative_error(moved, out[batch][:, heads]) < CLOSE


@given(seed=seeds, keys=st.integers(1, 150))
def test_without_causality_the_order_of_keys_is_nothing(operation, seed: int, keys: int) -> None:
    if operation.causal_only:
        return
    q, k, v = make_inputs(batch=1, queries=7, keys=keys, value_size=5, seed=seed)
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(seed))
    shuffled = operation.run(q, k[:, :, order], v[:, :, order])
    assert relative_error(shuffled, operation.run(q, k, v)) < CLOSE


@given(seed=seeds, keys=st.integers(1, 50), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_linear_in_the_values(operation, seed: int, keys: int, a: float, b: float) -> None:
    q, k, v = make_inputs(batch=1, keys=keys, value_size=5, seed=seed)
    w = make_inputs(batch=1, keys=keys, value_size=5, seed=seed + 1)[2]
    combined = operation.run(q, k, a * v + b * w, is_causal=True)
    separate = a * operation.run(q, k, v, is_causal=True) + b * operation.run(q, k, w, is_causal=True)
    assert (combined - separate).norm() <= CLOSE * (v.norm() + w.norm())


@given(seed=seeds, keys=st.integers(1, 50))
def test_a_normalised_output_lies_within_the_values_it_averages(operation, seed: int, keys: int) -> None:
    q, k, v = make_inputs(batch=1, keys=keys, value_size=5, seed=seed)
    out = operation.run(q, k, v, is_causal=True)
    low, high = v.cummin(dim=2).values, v.cummax(dim=2).values
    assert (out >= low - 1e-9).all()
    assert (out <= high + 1e-9).all()


@given(seed=seeds, keys=lengths, t=st.floats(0.01, 100), form=st.sampled_from(["direct", "chunked"]))
def test_scaling_the_coefficients(seed: int, keys: int, t: float, form: str) -> None:
    """Unnormalised attention is homogeneous in the coefficients; normalised attention does not see a common factor."""
    q, k, v = make_inputs(batch=1, keys=keys, value_size=5, seed=seed)
    plain, scaled = (1.0, 2.0, 1.0), (t, 2 * t, t)
    for normalize, factor in ((False, t), (True, 1.0)):
        options = {"normalize": normalize, "is_causal": True, "form": form}
        expected = factor * linattn.quadratic_attention(q, k, v, coefficients=plain, **options)
        actual = linattn.quadratic_attention(q, k, v, coefficients=scaled, **options)
        assert relative_error(actual, expected) < 1e-9


@given(seed=seeds, keys=lengths, t=st.floats(0.1, 10))
def test_scale_moves_between_queries_and_keys(seed: int, keys: int, t: float) -> None:
    q, k, v = make_inputs(batch=1, keys=keys, value_size=5, seed=seed)
    for function in (linattn.quadratic_attention, linattn.softmax_attention):
        expected = function(q, k, v, scale=0.5, is_causal=True)
        assert relative_error(function(q * t, k / t, v, scale=0.5, is_causal=True), expected) < 1e-9
        assert relative_error(function(q * t, k, v, scale=0.5 / t, is_causal=True), expected) < 1e-9


@given(cuts=st.lists(st.integers(0, 60), max_size=4), keys=st.integers(1, 60), seed=seeds)
def test_however_a_sequence_is_split(stateful, cuts: list[int], keys: int, seed: int) -> None:
    q, k, v = make_inputs(batch=1, keys=keys, head_size=4, value_size=3, seed=seed)
    whole, final = stateful.run(q, k, v, is_causal=True, return_state=True)
    edges = sorted({0, keys, *(c for c in cuts if c < keys)})
    state, outputs = None, []
    for a, b in itertools.pairwise(edges):
        out, state = stateful.run(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, initial_state=state, return_state=True
        )
        outputs.append(out)
    assert relative_error(torch.cat(outputs, dim=2), whole) < CLOSE
    assert torch.equal(state.n, final.n)
    for actual, expected in zip(state[1:], final[1:], strict=True):
        assert relative_error(actual, expected) < CLOSE


@given(seed=seeds, pieces=st.lists(st.integers(0, 25), min_size=1, max_size=5).filter(any))
def test_packing_equals_one_call_a_sequence(operation, seed: int, pieces: list[int]) -> None:
    bounds = torch.tensor([0, *pieces]).cumsum(0)
    q, k, v = make_inputs(batch=1, keys=sum(pieces), value_size=5, seed=seed)
    packed = operation.run(q, k, v, is_causal=True, cu_seqlens=bounds)
    edges = bounds.tolist()
    alone = [
        operation.run(*(t[:, :, a:b] for t in (q, k, v)), is_causal=True) for a, b in itertools.pairwise(edges) if b > a
    ]
    assert relative_error(packed, torch.cat(alone, dim=2)) < CLOSE


@given(seed=seeds, keys=st.integers(1, 40), extra=st.integers(1, 30))
def test_padding_changes_nothing(operation, seed: int, keys: int, extra: int) -> None:
    q, k, v = make_inputs(batch=1, keys=keys + extra, value_size=5, seed=seed)
    mask = (torch.arange(keys + extra) < keys)[None]
    padded = operation.run(q, k, v, is_causal=True, key_mask=mask)[:, :, :keys]
    cropped = operation.run(*(t[:, :, :keys] for t in (q, k, v)), is_causal=True)
    assert relative_error(padded, cropped) < CLOSE
