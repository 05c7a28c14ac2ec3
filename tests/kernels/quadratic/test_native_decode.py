"""A few new tokens beside a state, in native code: one pass over the state must give what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch

from linattn import QuadraticState, quadratic_attention
from linattn.kernels.common.op.backend import NATIVE_ABSENT
from linattn.testing import (
    LAYOUTS,
    assert_close_to_truth,
    assert_matches_truth,
    make_inputs,
    make_key_mask,
    truth_quadratic,
    truth_quadratic_state,
)

pytestmark = [pytest.mark.skipif(bool(NATIVE_ABSENT), reason=NATIVE_ABSENT), pytest.mark.usefixtures("poisoned")]


def step(q, k, v, state, **options):
    return quadratic_attention(
        q, k, v, initial_state=state, return_state=True, enable_gqa=True, backend="native", **options
    )


def state_of(k, v):
    """The exact state of some keys, rounded once."""
    n, *sums = truth_quadratic_state(k, v)
    return QuadraticState(n.expand(k.shape[0]).clone(), *(x.float() for x in sums))


def assert_same_state(state, expected):
    assert state.n.tolist() == expected[0].expand_as(state.n).tolist()
    for field, actual, truth in zip(state._fields[1:], state[1:], expected[1:], strict=True):
        assert_close_to_truth(actual, truth.to(actual.dtype), what=field, floor=1e-6)


def assert_steps_give_the_whole(q, k, v, lengths, **options):
    """The first length is taken at once, the others step by step."""
    expected = truth_quadratic(q, k, v, is_causal=True, **options)
    first, *others = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    out, state = quadratic_attention(
        *first, is_causal=True, return_state=True, enable_gqa=True, backend="native", form="chunked", **options
    )
    pieces = [out]
    for piece in others:
        out, state = step(*piece, state, is_causal=True, **options)
        pieces.append(out)
    assert_close_to_truth(torch.cat(pieces, 2), expected)
    assert_same_state(state, truth_quadratic_state(k, v))


@pytest.mark.parametrize(("D", "M"), [(1, 1), (7, 20), (16, 16), (33, 64), (64, 64), (100, 130), (128, 16), (200, 3)])
def test_head_sizes(D, M):
    q, k, v = make_inputs(batch=1, keys=40, head_size=D, value_size=M, dtype=torch.float32)
    assert_steps_give_the_whole(q, k, v, [30, 1, 1, 5, 3])


@pytest.mark.parametrize("lengths", [(20, 1, 16, 3), (1, 1, 1, 14, 2), (3, 16, 16), (100, 15, 1)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_lengths_and_groups(lengths, kv_heads):
    q, k, v = make_inputs(
        keys=sum(lengths), heads=4, kv_heads=kv_heads, head_size=12, value_size=20, dtype=torch.float32
    )
    assert_steps_give_the_whole(q, k, v, list(lengths))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype, layout):
    q, k, v = make_inputs(keys=40, head_size=24, layout=layout, dtype=dtype)
    assert_steps_give_the_whole(q, k, v, [33, 1, 6])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficients", [(1, 2, 1), (1, 1, 0.5), (0, 0, 1), (2, 0.3, 0.7)])
def test_coefficients(coefficients, normalize):
    q, k, v = make_inputs(keys=60, head_size=20, dtype=torch.float32)
    assert_steps_give_the_whole(q, k, v, [50, 1, 9], coefficients=coefficients, normalize=normalize, scale=-0.7)


@pytest.mark.parametrize("form", ["direct", "chunked", "recurrent"])
@pytest.mark.parametrize("q_offset", [-9, -2, 0, 3, 30])
def test_the_reference_agrees_on_masks_and_offsets(q_offset, form):
    q, k, v = make_inputs(queries=9, keys=13, heads=4, kv_heads=2, head_size=10, value_size=18, dtype=torch.float32)
    _, past_k, past_v = make_inputs(keys=50, kv_heads=2, head_size=10, value_size=18, seed=5)
    options = {"is_causal": True, "q_offset": q_offset, "key_mask": make_key_mask(2, 13), "form": form}
    state = state_of(past_k, past_v)
    out, after = step(q, k, v, state, **options)
    expected, expected_after = quadratic_attention(
        q, k, v, initial_state=state, return_state=True, enable_gqa=True, backend="reference", **options
    )
    assert_close_to_truth(out, expected)
    assert_same_state(after, expected_after)


def test_not_causal():
    q, k, v = make_inputs(queries=30, keys=13, heads=4, kv_heads=2, head_size=10, dtype=torch.float32)
    _, past_k, past_v = make_inputs(keys=50, kv_heads=2, head_size=10, dtype=torch.float32, seed=5)
    out, after = step(q, k, v, state_of(past_k, past_v))
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    assert_close_to_truth(out, truth_quadratic(q, keys, values))
    assert_same_state(after, truth_quadratic_state(keys, values))


def test_packed_sequences_one_of_them_empty():
    lengths = (1, 0, 16, 3)
    ends = torch.tensor([0, 1, 1, 17, 20])
    q, k, v = make_inputs(batch=1, keys=20, heads=4, kv_heads=2, head_size=9, dtype=torch.float32)
    _, past_k, past_v = make_inputs(batch=4, keys=30, kv_heads=2, head_size=9, dtype=torch.float32, seed=5)
    state = state_of(past_k, past_v)
    out, after = step(q, k, v, state, is_causal=True, cu_seqlens=ends)
    for s, (start, length) in enumerate(zip(ends.tolist(), lengths, strict=False)):
        rows = slice(start, start + length)
        past = past_k[s : s + 1], past_v[s : s + 1]
        keys, values = (torch.cat([x, y[:, :, rows]], 2) for x, y in zip(past, (k, v), strict=True))
        assert_same_state(QuadraticState(*(x[s : s + 1] for x in after)), truth_quadratic_state(keys, values))
        if length:
            expected = truth_quadratic(q[:, :, rows], k[:, :, rows], v[:, :, rows], is_causal=True, past=past)
            assert_close_to_truth(out[:, :, rows], expected)


def test_nan_in_padding_goes_nowhere():
    mask = make_key_mask(2, 12)
    q, k, v = make_inputs(keys=12, dtype=torch.float32)
    state = state_of(k, v)
    clean = step(q, k, v, state, is_causal=True, key_mask=mask)
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    out, after = step(q, k, v, state, is_causal=True, key_mask=mask)
    assert torch.equal(out, clean[0])
    assert all(torch.equal(a, b) for a, b in zip(after, clean[1], strict=True))


def test_the_state_that_went_in_is_left_alone():
    q, k, v = make_inputs(keys=5, head_size=16, dtype=torch.float32)
    state = state_of(k, v)
    copies = [x.clone() for x in state]
    step(q, k, v, state, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))


def test_rows_whose_sum_is_zero():
    q, k, v = make_inputs(keys=4, dtype=torch.float32)
    out, _ = step(torch.zeros_like(q), k, v, state_of(k, v), is_causal=True, coefficients=(0, 0, 1))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("keys", [1, 9])
def test_gradients(keys):
    q, k, v = make_inputs(keys=keys, heads=4, kv_heads=2, head_size=6, value_size=11, dtype=torch.float32)
    _, past_k, past_v = make_inputs(keys=60, kv_heads=2, head_size=6, value_size=11, dtype=torch.float32, seed=5)

    def ours(q, k, v, past_k, past_v):
        n, *sums = truth_quadratic_state(past_k, past_v)
        before = QuadraticState(n.expand(2).clone(), *(x.to(q.dtype) for x in sums))
        out, after = quadratic_attention(
            q, k, v, is_causal=True, initial_state=before, return_state=True, enable_gqa=True, backend="native"
        )
        return out, *(1e-2 * x for x in after[1:])

    def truth(q, k, v, past_k, past_v):
        sums = truth_quadratic_state(torch.cat([past_k, k], 2), torch.cat([past_v, v], 2))[1:]
        return truth_quadratic(q, k, v, is_causal=True, past=(past_k, past_v)), *(1e-2 * x for x in sums)

    assert_matches_truth(ours, truth, (q, k, v, past_k, past_v), names=("q", "k", "v", "past_k", "past_v"))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (9, 4)], ids=["one head", "two heads", "many heads"])
def test_threads_and_concurrent_callers(batch, heads, count, threads, concurrently):
    q, k, v = make_inputs(batch=batch, heads=heads, keys=3, head_size=40, dtype=torch.float32)
    _, past_k, past_v = make_inputs(batch=batch, heads=heads, keys=50, head_size=40, dtype=torch.float32, seed=5)
    before = state_of(past_k, past_v)
    threads(count)
    out, after = step(q, k, v, before, is_causal=True)
    assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True, past=(past_k, past_v)))
    assert_same_state(after, truth_quadratic_state(torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)))
    for runs in concurrently(lambda state: step(q, k, v, state, is_causal=True), [before] * 3):
        for again, state_again in runs:
            assert torch.equal(again, out)
            assert all(torch.equal(a, b) for a, b in zip(state_again, after, strict=True))


@pytest.mark.slow
def test_every_instruction_set(again_on_an_instruction_set):
    again = again_on_an_instruction_set(
        "test_head_sizes or test_lengths or test_packed or (test_dtypes and transposed)"
    )
    assert again.status == 0, again.printed
    assert again.passed > 0, again.printed
    assert again.used == again.wanted
