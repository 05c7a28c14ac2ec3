"""Quadratic-kernel attention against the formula, form by form."""

from __future__ import annotations

import math

import pytest
import torch

import linattn
from linattn.testing import LAYOUTS, Layout, assert_close_to_truth, make_inputs, relative_error, truth_quadratic

FORMS = ("direct", "chunked", "recurrent")
COEFFICIENTS = {
    "square": (1, 2, 1),
    "taylor": (1, 1, 0.5),
    "symmetric power": (0, 0, 1),
    "raised": (2.0, 1.0, 0.75),
    "no linear term": (0.5, 0, 2),
}


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys", [1, 33, 300])
def test_causal_equals_the_formula(form: str, coefficients: tuple[float, float, float], keys: int) -> None:
    if form == "recurrent" and keys > 33:
        pytest.skip("one step a token: covered by the shorter lengths")
    q, k, v = make_inputs(keys=keys, value_size=5, positive=coefficients[1] == 0, dtype=torch.float32)
    out = linattn.quadratic_attention(q, k, v, is_causal=True, coefficients=coefficients, form=form)
    assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True, coefficients=coefficients))


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
@pytest.mark.parametrize("form", ["direct", "chunked"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 7), (5, 300), (129, 129)])
def test_over_all_keys_equals_the_formula(
    form: str, coefficients: tuple[float, float, float], queries: int, keys: int
) -> None:
    q, k, v = make_inputs(queries=queries, keys=keys, value_size=5, positive=coefficients[1] == 0, dtype=torch.float32)
    out = linattn.quadratic_attention(q, k, v, coefficients=coefficients, form=form)
    assert_close_to_truth(out, truth_quadratic(q, k, v, coefficients=coefficients))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["direct", "chunked"])
def test_unnormalised_accepts_a_similarity_of_any_sign(form: str, is_causal: bool) -> None:
    q, k, v = make_inputs(keys=70, value_size=3, score_std=1.0)
    options = {"coefficients": (-1.0, 0.5, 0.25), "normalize": False, "is_causal": is_causal}
    out = linattn.quadratic_attention(q, k, v, form=form, **options)
    assert_close_to_truth(out, truth_quadratic(q, k, v, **options))


@pytest.mark.parametrize("form", FORMS)
def test_scale_multiplies_the_score_and_not_the_result(form: str) -> None:
    q, k, v = make_inputs(keys=40, head_size=16)
    for normalize in (True, False):
        out = linattn.quadratic_attention(q, k, v, is_causal=True, scale=0.25, normalize=normalize, form=form)
        assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True, scale=0.25, normalize=normalize))
    negative = linattn.quadratic_attention(q, k, v, is_causal=True, scale=-0.25, form=form)
    assert_close_to_truth(negative, truth_quadratic(-q, k, v, is_causal=True, scale=0.25))


def test_scale_is_one_unless_given() -> None:
    q, k, v = make_inputs()
    assert torch.equal(linattn.quadratic_attention(q, k, v), linattn.quadratic_attention(q, k, v, scale=1.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_memory_layout_gives_the_same(form: str, layout: Layout) -> None:
    q, k, v = make_inputs(keys=35, heads=4, kv_heads=4, head_size=6, value_size=4, layout=layout)
    before = [t.clone() for t in (q, k, v)]
    out = linattn.quadratic_attention(q, k, v, is_causal=True, form=form)
    assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True))
    assert all(torch.equal(t, b) for t, b in zip((q, k, v), before, strict=True)), "an input was written to"


def test_the_output_is_stored_in_the_order_of_q() -> None:
    for layout in ("contiguous", "transposed"):
        q, k, v = make_inputs(layout=layout, value_size=5)
        out = linattn.quadratic_attention(q, k, v)
        stored = out.transpose(1, 2) if layout == "transposed" else out
        assert stored.is_contiguous(), f"{layout}: {out.stride()}"


def _pairs(x: torch.Tensor) -> torch.Tensor:
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1)
    return math.sqrt(2) * x[..., i] * x[..., j]


def _exact_map(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), math.sqrt(2) * x, x * x, _pairs(x)], dim=-1)


def _misprinted_map(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(x[..., :1]), x, x * x, _pairs(x)], dim=-1)


def test_the_exact_feature_map_is_the_quadratic_kernel() -> None:
    q, k, v = make_inputs(keys=40, head_size=5, score_std=1.0)
    assert _exact_map(q).shape[-1] == (5 + 1) * (5 + 2) // 2
    for normalize in (True, False):
        by_kernel = linattn.quadratic_attention(q, k, v, normalize=normalize, form="chunked")
        by_features = linattn.linear_attention(q, k, v, feature_map=_exact_map, normalize=normalize)
        assert relative_error(by_features, by_kernel) < 1e-12


def test_the_misprinted_feature_map_is_another_kernel() -> None:
    """Without sqrt2 on its linear terms the map yields 1 + s + s^2."""
    q, k, v = make_inputs(keys=40, head_size=5, score_std=1.0)
    printed = linattn.linear_attention(q, k, v, feature_map=_misprinted_map)
    assert relative_error(printed, linattn.quadratic_attention(q, k, v)) > 1e-2
    assert relative_error(printed, linattn.quadratic_attention(q, k, v, coefficients=(1, 1, 1))) < 1e-12


def test_attention_by_name_has_the_kernels_own_defaults() -> None:
    q, k, v = make_inputs(head_size=16, score_std=4.0)
    assert torch.equal(linattn.attention(q, k, v, kernel="quadratic"), linattn.quadratic_attention(q, k, v))
    taylor = linattn.quadratic_attention(q, k, v, coefficients=(1, 1, 0.5), scale=1 / math.sqrt(16))
    assert torch.equal(linattn.attention(q, k, v, kernel="taylor"), taylor)
    assert torch.equal(linattn.attention(q, k, v, kernel="softmax"), linattn.softmax_attention(q, k, v))
    assert torch.equal(
        linattn.attention(q, k, v, kernel="relu2", is_causal=True),
        linattn.linear_attention(q, k, v, feature_map="relu2", is_causal=True),
    )
