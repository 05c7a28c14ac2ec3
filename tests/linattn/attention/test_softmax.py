"""Softmax attention against the formula and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import linattn
from linattn.errors import BackendError
from linattn.testing import (
    LAYOUTS,
    Layout,
    assert_close_to_truth,
    assert_matches_truth,
    make_inputs,
    make_key_mask,
    truth_softmax,
)

BACKENDS = ("reference", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [1, 15, 129, 500])
def test_equals_the_formula(backend: str, is_causal: bool, keys: int) -> None:
    q, k, v = make_inputs(keys=keys, head_size=16, score_std=8.0, dtype=torch.float32)
    out = linattn.softmax_attention(q, k, v, is_causal=is_causal, backend=backend)
    assert_close_to_truth(out, truth_softmax(q, k, v, is_causal=is_causal))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_defaults_to_one_over_root_of_head_size(backend: str) -> None:
    q, k, v = make_inputs(head_size=16, score_std=4.0)
    out = linattn.softmax_attention(q, k, v, backend=backend)
    assert torch.equal(out, linattn.softmax_attention(q, k, v, scale=0.25, backend=backend))
    assert_close_to_truth(
        linattn.softmax_attention(q, k, v, scale=2.0, backend=backend), truth_softmax(q, k, v, scale=2.0)
    )


def test_agrees_with_pytorch_under_a_mask() -> None:
    q, k, v = make_inputs(heads=4, kv_heads=2, queries=20, keys=70, score_std=4.0)
    mask = make_key_mask(2, 70)
    out = linattn.softmax_attention(q, k, v, key_mask=mask, enable_gqa=True)
    peer = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], enable_gqa=True)
    assert_close_to_truth(out, peer)


def test_backends_agree_on_grouped_heads() -> None:
    tensors = make_inputs(heads=4, kv_heads=2, keys=70, score_std=4.0)
    for backend in BACKENDS:
        assert_matches_truth(
            lambda *t, b=backend: linattn.softmax_attention(*t, is_causal=True, enable_gqa=True, backend=b),
            lambda *t: truth_softmax(*t, is_causal=True),
            tensors,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_gives_the_same(layout: Layout) -> None:
    q, k, v = make_inputs(keys=35, value_size=8, layout=layout)
    for backend in BACKENDS:
        if backend == "torch" and layout == "strided":  # PyTorch would hold an N x N matrix
            with pytest.raises(BackendError, match="last stride"):
                linattn.softmax_attention(q, k, v, is_causal=True, backend=backend)
            continue
        out = linattn.softmax_attention(q, k, v, is_causal=True, backend=backend)
        assert_close_to_truth(out, truth_softmax(q, k, v, is_causal=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_far_beyond_the_range_of_exp_stay_finite(is_causal: bool) -> None:
    q, k, v = make_inputs(keys=300, head_size=8, score_std=2e3, dtype=torch.float32)
    out = linattn.softmax_attention(q, k, v, is_causal=is_causal, scale=1.0, backend="reference")
    assert out.isfinite().all()
    # Scores of thousands carry an absolute rounding error of about 1e-3, and the weights inherit it.
    error = (out.double() - truth_softmax(q, k, v, is_causal=is_causal, scale=1.0)).norm() / out.double().norm()
    assert error < 2e-3


def test_a_common_shift_of_the_scores_changes_nothing() -> None:
    """Adding the same vector to every key adds the same number to all scores of a query."""
    q, k, v = make_inputs(keys=80)
    shifted = linattn.softmax_attention(q, k + 0.5, v, is_causal=True)
    assert_close_to_truth(shifted, linattn.softmax_attention(q, k, v, is_causal=True))
