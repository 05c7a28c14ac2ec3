"""Corners where a first version was wrong: each of these failed once."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import linattn
from linattn._dispatch import plan
from linattn.errors import ArgumentError, BackendError, DtypeError, LinattnError, StateError
from linattn.testing import make_inputs, relative_error, truth_quadratic

QUADRATIC_ROOT_FAR_AWAY = [(1.0, 1.0, 1e-6), (0.0, 1.0, 1e-4)]


@pytest.mark.unpoisoned
@pytest.mark.usual_tiles
def test_compiled_code_notices_a_backend_chosen_around_it() -> None:
    tensors = make_inputs(keys=8, dtype=torch.float32)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda *t: linattn.softmax_attention(*t), fullgraph=True, backend=counter)
    compiled(*tensors)
    with linattn.use_backend("reference"):
        compiled(*tensors)
    assert counter.frame_count == 2
    compiled(*tensors)
    assert counter.frame_count == 2


@pytest.mark.unpoisoned
@pytest.mark.usual_tiles
@pytest.mark.parametrize(
    "call",
    [
        lambda x: linattn.quadratic_attention(x, x, x),
        lambda x: linattn.linear_attention(x, x, x),
        lambda x: linattn.softmax_attention(x, x, x, backend="reference"),
        lambda x: linattn.argmax_attention(x, x, x),
    ],
)
def test_one_tensor_as_query_key_and_value_compiles_with_gradients(call) -> None:
    x = make_inputs(keys=8, dtype=torch.float32)[0].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(call(x).square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_rows_beyond_few_keys_are_computed_from_scores(form: str) -> None:
    """All 40 queries see only 2 keys: their sums nearly vanish in some draws, and the state would lose them."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 1, n, 4, generator=generator) for n in (40, 2, 2))
        direct, other = (
            linattn.quadratic_attention(q, k, v, is_causal=True, q_offset=0, form=f, backend="reference")
            for f in ("direct", form)
        )
        assert torch.equal(direct, other)


def test_an_empty_state_without_a_mask_leaves_few_keys_to_their_scores() -> None:
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 1, n, 4, generator=generator) for n in (40, 2, 2))
        empty = linattn.QuadraticState.empty(1, 1, 4, 4)
        expected = truth_quadratic(q.double(), k.double(), v.double())
        direct, chunked = (
            relative_error(linattn.quadratic_attention(q, k, v, initial_state=empty, form=form), expected)
            for form in ("direct", "chunked")
        )
        assert chunked <= 2 * direct + 1e-6


@pytest.mark.parametrize("coefficients", QUADRATIC_ROOT_FAR_AWAY)
@pytest.mark.parametrize("form", ["direct", "chunked"])
def test_an_unnormalised_kernel_whose_root_is_far_from_all_scores_keeps_its_digits(form: str, coefficients) -> None:
    tensors = make_inputs(keys=64, head_size=8, dtype=torch.float32)
    options = {"is_causal": True, "normalize": False, "coefficients": coefficients}
    actual = linattn.quadratic_attention(*tensors, form=form, **options)
    assert relative_error(actual, truth_quadratic(*(t.double() for t in tensors), **options)) < 1e-5


def test_a_last_stride_that_torch_would_answer_with_an_n_by_n_matrix_goes_elsewhere() -> None:
    q = torch.randn(1, 1, 16, 64).mT
    assert linattn.explain(q, q, q, kernel="softmax").backend == "reference"
    with pytest.raises(BackendError, match="last stride"):
        linattn.softmax_attention(q, q, q, backend="torch")


def test_argmax_compares_exact_scores_under_autocast() -> None:
    q, k, v = make_inputs(keys=512, head_size=32, dtype=torch.bfloat16)
    expected = linattn.argmax_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linattn.argmax_attention(q, k, v), expected)


def test_the_condition_of_a_row_without_keys_is_infinite() -> None:
    q, k, _ = make_inputs(keys=4)
    assert linattn.quadratic_condition(q, k, is_causal=True, q_offset=-1)[..., 0].isinf().all()


@pytest.mark.parametrize(
    "options",
    [
        {"coefficients": (1, 2, 0)},
        {"scale": float("nan")},
        {"initial_state": 3},
        {"form": "recurrent"},
        {"cu_seqlens": torch.tensor([0, 9])},
    ],
)
def test_explain_refuses_what_the_call_refuses(options) -> None:
    q, k, v = make_inputs(batch=1, keys=8)
    with pytest.raises(LinattnError) as call:
        linattn.quadratic_attention(q, k, v, **options)
    with pytest.raises(type(call.value)):
        linattn.explain(q, k, v, **options)


def test_explain_counts_packed_sequences_by_their_own_length() -> None:
    q, k, v = make_inputs(batch=1, heads=1, keys=1280, head_size=8)
    packed = linattn.explain(q, k, v, cu_seqlens=torch.arange(0, 1281, 64), form="direct").cost.flops
    assert packed * 20 == linattn.explain(q, k, v, form="direct").cost.flops
    assert linattn.explain(q, k[:, :, :10], v[:, :, :10], is_causal=True, q_offset=0, form="direct").cost.flops > 0


def test_a_feature_map_is_named_once() -> None:
    q, k, v = make_inputs(keys=4)
    with pytest.raises(ArgumentError, match="feature_map"):
        linattn.attention(q, k, v, kernel="elu+1", feature_map="relu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_autocast_makes_no_attention_of_other_numbers(dtype: torch.dtype) -> None:
    x = torch.ones(1, 1, 4, 2, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(DtypeError):
        linattn.quadratic_attention(x, x, x)


def test_padding_does_not_reach_the_parameters_of_a_feature_map() -> None:
    q, k, v = make_inputs(batch=1, heads=1, keys=6, head_size=3, dtype=torch.float32)
    key_mask = torch.tensor([[True] * 4 + [False] * 2])
    k[:, :, 4:] = float("nan")
    feature_map = nn.Sequential(nn.Linear(3, 5), nn.Softplus())
    linattn.linear_attention(q, k, v, feature_map=feature_map, key_mask=key_mask).sum().backward()
    assert feature_map[0].weight.grad.isfinite().all()


def test_a_state_that_is_returned_but_not_differentiated_adds_nothing() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(keys=40, head_size=4)]
    plain = torch.autograd.grad(linattn.quadratic_attention(*leaves).sum(), leaves)
    out, _ = linattn.quadratic_attention(*leaves, return_state=True, form="direct")
    assert all(torch.allclose(a, b) for a, b in zip(torch.autograd.grad(out.sum(), leaves), plain, strict=True))
    _, state = linattn.quadratic_attention(*leaves, return_state=True)
    dq, _, dv = torch.autograd.grad(state.v_sum.sum(), leaves)
    assert not dq.any()
    assert torch.equal(dv, torch.ones_like(dv))


def test_states_of_different_sizes_are_not_added() -> None:
    one, three = (linattn.QuadraticState.empty(B, 2, 4, 4) for B in (1, 3))
    with pytest.raises(StateError, match="merge"):
        one.merge(three)
    with pytest.raises(StateError, match="FeatureMapState"):
        one.merge(linattn.FeatureMapState.empty(1, 2, 4, 4))


def test_a_saved_state_loads_with_the_default_settings() -> None:
    _, state = linattn.quadratic_attention(*make_inputs(keys=20), return_state=True)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, linattn.QuadraticState)
    assert all(torch.equal(a, b) for a, b in zip(loaded, state, strict=True))


def test_explaining_a_call_leaves_nothing_behind() -> None:
    tensors = make_inputs(keys=4)
    before = dict(vars(plan._chosen))
    linattn.explain(*tensors)
    linattn.quadratic_attention(*tensors)
    assert vars(plan._chosen) == before
