"""The native chunked form: outputs, states and every gradient against float64, on each instruction set."""

from __future__ import annotations

import itertools

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

LEFT_PADDED = torch.arange(70)[None].expand(2, -1) >= 40


def chunked(q, k, v, **options):
    gqa = q.shape[1] != k.shape[1]
    return quadratic_attention(q, k, v, form="chunked", backend="native", enable_gqa=gqa, **options)


def assert_matches(tensors, **options):
    assert_matches_truth(
        lambda q, k, v: chunked(q, k, v, **options), lambda q, k, v: truth_quadratic(q, k, v, **options), tensors
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 129, 500])
def test_odd_lengths(T, is_causal):
    assert_matches(make_inputs(keys=T, head_size=12, value_size=20, dtype=torch.float32), is_causal=is_causal)


@pytest.mark.parametrize(("D", "M"), [(1, 1), (16, 16), (32, 5), (33, 64), (64, 100), (100, 130), (128, 16), (256, 24)])
def test_head_sizes(D, M):
    assert_matches(make_inputs(batch=1, keys=150, head_size=D, value_size=M, dtype=torch.float32), is_causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layouts(dtype, layout):
    assert_matches(make_inputs(keys=140, head_size=24, layout=layout, dtype=dtype), is_causal=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficients", [(1, 2, 1), (1, 1, 0.5), (0, 0, 1), (2, 0.3, 0.7)])
def test_coefficients(coefficients, normalize):
    q, k, v = make_inputs(keys=150, head_size=20, dtype=torch.float32)
    assert_matches((q, k, v), is_causal=True, coefficients=coefficients, normalize=normalize, scale=-0.7)


@pytest.mark.parametrize("key_mask", [None, make_key_mask(2, 70), LEFT_PADDED], ids=["none", "random", "left"])
@pytest.mark.parametrize("q_offset", [-60, -3, 0, 20, 200])
def test_unequal_lengths_masks_and_groups(q_offset, key_mask):
    q, k, v = make_inputs(queries=150, keys=70, heads=4, kv_heads=2, head_size=10, value_size=72, dtype=torch.float32)
    assert_matches((q, k, v), is_causal=True, q_offset=q_offset, key_mask=key_mask)


def test_nan_in_padding_goes_nowhere():
    mask = make_key_mask(2, 90)
    q, k, v = make_inputs(keys=90, dtype=torch.float32)
    clean = chunked(q, k, v, is_causal=True, key_mask=mask)
    k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    assert torch.equal(chunked(q, k, v, is_causal=True, key_mask=mask), clean)


@pytest.mark.parametrize("lengths", [(40, 0, 100, 1), (0, 0, 3)])
def test_packed_sequences(lengths):
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    q, k, v = make_inputs(batch=1, keys=sum(lengths), heads=4, kv_heads=2, head_size=9, dtype=torch.float32)
    assert_matches((q, k, v), is_causal=True, cu_seqlens=ends)
    _, state = chunked(q, k, v, cu_seqlens=ends, return_state=True)
    for field, expected in zip(state, truth_quadratic_state(k, v, cu_seqlens=ends), strict=True):
        assert_close_to_truth(field.float(), expected.float(), floor=1e-6)


@pytest.mark.parametrize("form", ["direct", "chunked", "recurrent"])
@pytest.mark.parametrize("past", [0, 1, 100])
def test_states_and_their_gradients(past, form):
    q, k, v = make_inputs(keys=90, heads=4, kv_heads=2, head_size=6, value_size=11, dtype=torch.float32)
    _, past_k, past_v = make_inputs(
        keys=max(past, 1), kv_heads=2, head_size=6, value_size=11, dtype=torch.float32, seed=5
    )
    past_k, past_v = past_k[:, :, :past], past_v[:, :, :past]

    def state_of(k, v):
        return truth_quadratic_state(k, v) if past else QuadraticState.empty(2, 2, 6, 11, dtype=torch.float64)

    def ours(q, k, v, past_k, past_v):
        n, *sums = state_of(past_k, past_v)
        n = n.expand(2).clone() if n.ndim == 0 else n
        before = QuadraticState(n, *(x.to(q.dtype) for x in sums))
        out, state = quadratic_attention(
            q,
            k,
            v,
            is_causal=True,
            initial_state=before,
            return_state=True,
            form=form,
            backend="native",
            enable_gqa=True,
        )
        assert state.n.tolist() == [past + 90] * 2
        return out, *(1e-2 * x for x in state[1:])

    def truth(q, k, v, past_k, past_v):
        out = truth_quadratic(q, k, v, is_causal=True, past=(past_k, past_v))
        sums = truth_quadratic_state(torch.cat([past_k, k], 2), torch.cat([past_v, v], 2))[1:]
        return out, *(1e-2 * x for x in sums)

    assert_matches_truth(ours, truth, (q, k, v, past_k, past_v), names=("q", "k", "v", "past_k", "past_v"))


def test_the_direct_form_returns_its_state():
    q, k, v = make_inputs(keys=300, head_size=17, dtype=torch.float32)
    _, state = quadratic_attention(q, k, v, is_causal=True, return_state=True, form="direct", backend="native")
    for field, expected in zip(state, truth_quadratic_state(k, v), strict=True):
        assert_close_to_truth(field.float(), expected.float())


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_gradients_that_nobody_wants_change_nothing(wanted):
    tensors = dict(zip("qkv", make_inputs(keys=150, dtype=torch.float32), strict=True))

    def gradients(names):
        leaves = {name: x.clone().requires_grad_(name in names) for name, x in tensors.items()}
        out = chunked(*leaves.values(), is_causal=True)
        return dict(zip(names, torch.autograd.grad(out.square().sum(), [leaves[x] for x in names]), strict=True))

    everything = gradients("qkv")
    for name, gradient in gradients(wanted).items():
        assert torch.equal(gradient, everything[name])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_threads_and_concurrent_callers_give_the_same_bits(count, threads, concurrently):
    tensors = make_inputs(batch=1, heads=3, keys=700, head_size=16, dtype=torch.float32)

    def call(tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = chunked(*leaves, is_causal=True)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    threads(1)
    expected = call(tensors)
    threads(count)
    for runs in concurrently(call, [tensors] * 3):
        for again in runs:
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.slow
def test_every_instruction_set(again_on_an_instruction_set):
    again = again_on_an_instruction_set(
        "test_head_sizes or test_unequal_lengths or test_states or (test_dtypes and transposed)"
    )
    assert again.status == 0, again.printed
    assert again.passed > 0, again.printed
    assert again.used == again.wanted
