"""Who sees whom: padding masks, causal alignment, grouped heads and packed sequences, alone and together."""

from __future__ import annotations

import pytest
import torch

import linattn
from linattn.testing import (
    assert_close_to_truth,
    assert_matches_truth,
    condition_number,
    evaluate,
    make_inputs,
    make_key_mask,
    visible_keys,
)


def _length(operation, keys: int) -> int:
    return min(keys, 40) if operation.causal_only else keys


@pytest.mark.parametrize("is_causal", [False, True])
def test_masked_keys_count_nowhere(operation, is_causal: bool) -> None:
    if operation.causal_only and not is_causal:
        pytest.skip("this form is causal only")
    q, k, v = make_inputs(keys=_length(operation, 140), value_size=5)
    mask = make_key_mask(2, k.shape[2])
    for normalize in (True, False) if operation.has_state else (None,):
        options = {} if normalize is None else {"normalize": normalize}
        assert_matches_truth(
            lambda *t, o=options: operation.run(*t, is_causal=is_causal, key_mask=mask, **o),
            lambda *t, o=options: operation.truth(*t, is_causal=is_causal, key_mask=mask, **o),
            (q, k, v),
        )


@pytest.mark.parametrize("keep", [0.05, 0.3])
@pytest.mark.parametrize("offset", [0, 30])
def test_few_real_keys_far_apart(operation, keep: float, offset: int) -> None:
    """Rows pass whole chunks before they have seen sixteen keys; the queries begin among the keys."""
    queries, keys = (20, 50) if operation.causal_only else (100, 130)
    q, k, v = make_inputs(queries=queries, keys=keys, value_size=5)
    mask = make_key_mask(2, keys, keep=keep)
    mask[1] = mask[1].flip(0)
    for is_causal in (True,) if operation.causal_only else (True, False):
        options = {"is_causal": is_causal, "key_mask": mask} | ({"q_offset": offset} if is_causal else {})
        assert_matches_truth(
            lambda *t, o=options: operation.run(*t, **o), lambda *t, o=options: operation.truth(*t, **o), (q, k, v)
        )


def test_a_masked_key_may_hold_anything(operation) -> None:
    """Padding is often NaN or garbage; neither it nor its gradient may leak."""
    q, k, v = make_inputs(keys=40, value_size=5)
    mask = make_key_mask(2, 40)
    clean, clean_gradients = evaluate(lambda *t: operation.run(*t, is_causal=True, key_mask=mask), (q, k, v))
    for t in (k, v):
        t.masked_fill_(~mask[:, None, :, None], float("nan"))
    dirty, gradients = evaluate(lambda *t: operation.run(*t, is_causal=True, key_mask=mask), (q, k, v))
    assert torch.equal(clean[0], dirty[0])
    for actual, expected in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(actual, expected)


def test_a_row_that_sees_no_key_is_zero_with_zero_gradient(operation) -> None:
    q, k, v = make_inputs(keys=30, value_size=5, dtype=torch.float32)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, :] = False
    (out,), (dq, dk, dv) = evaluate(lambda *t: operation.run(*t, is_causal=True, key_mask=mask), (q, k, v))
    truth, true_gradients = evaluate(
        lambda *t: operation.truth(*t, is_causal=True, key_mask=mask),
        [t.double() for t in (q, k, v)],
        upstream_dtype=torch.float32,
    )
    for t in (out, dq):
        assert not t[0, :, :4].any()
        assert not t[1].any()
    for t in (dk, dv):
        assert not t[0, :, :4].any()
        assert not t[1].any()
    assert_close_to_truth(out, truth[0])
    for actual, expected in zip((dq, dk, dv), true_gradients, strict=True):
        assert_close_to_truth(actual, expected, gradient=True)


@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [
        (1, 40, 39),
        (5, 40, 35),
        (40, 40, 0),
        (40, 40, 7),
        (7, 3, 0),
        (20, 35, 3),
        (35, 20, 50),
        (150, 300, 150),
    ],
)
def test_q_offset_places_the_queries_among_the_keys(operation, queries: int, keys: int, offset: int) -> None:
    if operation.causal_only and keys > 40:
        pytest.skip("one step a token: covered by the shorter lengths")
    q, k, v = make_inputs(queries=queries, keys=keys, value_size=5)
    assert_matches_truth(
        lambda *t: operation.run(*t, is_causal=True, q_offset=offset),
        lambda *t: operation.truth(*t, is_causal=True, q_offset=offset),
        (q, k, v),
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_share_key_heads(operation, kv_heads: int) -> None:
    q, k, v = make_inputs(heads=4, kv_heads=kv_heads, keys=_length(operation, 90), value_size=5)
    assert_matches_truth(
        lambda *t: operation.run(*t, is_causal=True, enable_gqa=True),
        lambda *t: operation.truth(*t, is_causal=True),
        (q, k, v),
    )


BOUNDS = ([0, 45], [0, 1, 2, 45], [0, 0, 20, 20, 37, 45, 45], [0, 17, 45])


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_do_not_see_each_other(operation, bounds: list[int], index_dtype: torch.dtype) -> None:
    q, k, v = make_inputs(batch=1, heads=4, kv_heads=2, keys=45, value_size=5)
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype)
    for is_causal in (True,) if operation.causal_only else (True, False):
        options = {"is_causal": is_causal, "cu_seqlens": cu_seqlens}
        assert_matches_truth(
            lambda *t, o=options: operation.run(*t, enable_gqa=True, **o),
            lambda *t, o=options: operation.truth(*t, **o),
            (q, k, v),
        )


def test_packed_sequences_longer_than_a_tile(operation) -> None:
    if operation.causal_only:
        pytest.skip("one step a token: covered by the shorter lengths")
    q, k, v = make_inputs(batch=1, keys=420, value_size=5, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 150, 151, 420])
    out = operation.run(q, k, v, is_causal=True, cu_seqlens=cu_seqlens)
    assert_close_to_truth(out, operation.truth(q, k, v, is_causal=True, cu_seqlens=cu_seqlens))


def test_everything_together(stateful) -> None:
    q, k, v = make_inputs(batch=1, heads=4, kv_heads=2, keys=45, head_size=6, value_size=5, layout="fused")
    mask = make_key_mask(1, 45)
    past = make_inputs(batch=3, heads=2, keys=9, head_size=6, value_size=5, seed=9)[1:]
    cu_seqlens = torch.tensor([0, 20, 21, 45])
    first = {"is_causal": True, "return_state": True}

    def run(q, k, v, past_k, past_v):
        _, state = stateful.run(past_k, past_k, past_v, **first)
        return stateful.run(
            q, k, v, is_causal=True, enable_gqa=True, key_mask=mask, cu_seqlens=cu_seqlens, initial_state=state
        )

    def truth(q, k, v, past_k, past_v):
        return stateful.truth(q, k, v, is_causal=True, key_mask=mask, cu_seqlens=cu_seqlens, past=(past_k, past_v))

    assert_matches_truth(run, truth, (q, k, v, *past), names=("q", "k", "v", "earlier keys", "earlier values"))


def test_the_condition_follows_the_same_masks() -> None:
    """Any honest bound of |q.k| lies between sum_d |q_d k_d| and |q| |k|, so kappa lies between theirs."""
    q, k, _ = make_inputs(heads=4, kv_heads=2, keys=40, score_std=1.0)
    mask = make_key_mask(2, 40)
    kappa = linattn.quadratic_condition(q, k, is_causal=True, key_mask=mask, enable_gqa=True)
    assert kappa.shape == (2, 4, 40)
    lower = condition_number(q, k, is_causal=True, key_mask=mask)
    shared = k.repeat_interleave(2, dim=1)
    seen = visible_keys(40, 40, is_causal=True, key_mask=mask)
    bound = torch.where(seen, (1 + q.norm(dim=-1, keepdim=True) @ shared.norm(dim=-1, keepdim=True).mT) ** 2, 0)
    upper = bound.sum(dim=-1) / torch.where(seen, (1 + q @ shared.mT) ** 2, 0).sum(dim=-1)
    some = seen.any(dim=-1).expand(2, 4, 40)
    assert (kappa[some] >= 0.999 * lower[some]).all()
    assert (kappa[some] <= 1.001 * upper[some]).all()
