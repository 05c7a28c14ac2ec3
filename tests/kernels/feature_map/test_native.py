"""Native feature-map attention: against the truth, on every instruction set, at every number of threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn.errors import BackendError
from linattn.kernels.common.op.backend import NATIVE_ABSENT
from linattn.testing import (
    LAYOUTS,
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    make_key_mask,
    truth_feature_state,
    truth_linear,
)

pytestmark = [pytest.mark.skipif(bool(NATIVE_ABSENT), reason=NATIVE_ABSENT), pytest.mark.usefixtures("poisoned")]
native = partial(linattn.linear_attention, backend="native")


@pytest.fixture(params=[1, 3])
def thread_count(request: pytest.FixtureRequest, threads: Any) -> int:
    threads(request.param)
    return int(request.param)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("T", [1, 15, 48, 49, 500])
@pytest.mark.parametrize(("D", "M"), [(16, 16), (33, 7), (64, 130), (200, 256)])
def test_outputs_and_gradients_at_odd_sizes(T: int, D: int, M: int, is_causal: bool, thread_count: int) -> None:
    inputs = make_inputs(batch=1, heads=2, kv_heads=1, keys=T, head_size=D, value_size=M, dtype=torch.float32)
    run = partial(native, is_causal=is_causal, enable_gqa=True)
    assert_matches_truth(run, partial(truth_linear, is_causal=is_causal), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", ["elu+1", "relu", "relu2", "exp"])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_map_in_every_dtype(feature_map: str, normalize: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(keys=100, head_size=24, value_size=40, dtype=dtype, positive=feature_map.startswith("relu"))
    options = {"feature_map": feature_map, "normalize": normalize, "is_causal": True, "scale": 0.5}
    out = native(*inputs, **options)
    assert_close_to_truth(out, truth_linear(*inputs, **options))
    if dtype == torch.float32 and not normalize:
        assert_matches_truth(partial(native, **options), partial(truth_linear, **options), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    inputs = make_inputs(keys=70, head_size=20, value_size=12, layout=layout, dtype=torch.float32)  # type: ignore[arg-type]
    assert_matches_truth(partial(native, is_causal=True), partial(truth_linear, is_causal=True), inputs)


@pytest.mark.parametrize("q_offset", [-60, -7, 0, 30, 90])
def test_queries_and_keys_of_different_lengths(q_offset: int, thread_count: int) -> None:
    inputs = make_inputs(queries=75, keys=420, head_size=16, dtype=torch.float32)
    options = {"is_causal": True, "q_offset": q_offset}
    assert_matches_truth(partial(native, **options), partial(truth_linear, **options), inputs)


def test_masked_keys_may_hold_anything(thread_count: int) -> None:
    q, k, v = make_inputs(keys=450, heads=1, head_size=16, dtype=torch.float32)
    mask = make_key_mask(2, 450)
    hidden = ~mask[:, None, :, None]
    truth = partial(truth_linear, is_causal=True, key_mask=mask)
    expected = truth(q, k, v)
    dirty_k, dirty_v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("inf"))
    assert_close_to_truth(native(q, dirty_k, dirty_v, is_causal=True, key_mask=mask), expected)
    _, gradients = evaluate(partial(native, is_causal=True, key_mask=mask), (q, dirty_k, dirty_v))
    _, true_gradients = evaluate(truth, [t.double() for t in (q, k, v)])
    for name, mine, true in zip("qkv", gradients, true_gradients, strict=True):
        assert_close_to_truth(mine, true, gradient=True, dtype=torch.float32, what=name)
        assert name == "q" or not mine.masked_select(hidden).any()


def test_packed_sequences_and_their_states(thread_count: int) -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 250, 251, 500])
    q, k, v = make_inputs(batch=1, keys=500, head_size=16, value_size=12, dtype=torch.float32)
    out, state = native(q, k, v, is_causal=True, cu_seqlens=cu_seqlens, return_state=True)
    assert_close_to_truth(out, truth_linear(q, k, v, is_causal=True, cu_seqlens=cu_seqlens))
    for mine, true in zip(state, truth_feature_state(k, v, cu_seqlens=cu_seqlens), strict=True):
        assert_close_to_truth(mine, true, dtype=torch.float32)


def test_a_sequence_in_pieces_is_the_sequence(thread_count: int) -> None:
    q, k, v = make_inputs(keys=600, heads=1, batch=1, head_size=16, dtype=torch.float32)

    def in_pieces(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        outs, state = [], None
        for part in (slice(0, 1), slice(1, 300), slice(300, 600)):
            pieces = [x[:, :, part] for x in (q, k, v)]
            out, state = native(*pieces, is_causal=True, initial_state=state, return_state=True)
            outs.append(out)
        return [torch.cat(outs, dim=2), *state[1:]]

    def truth(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [truth_linear(q, k, v, is_causal=True), *truth_feature_state(k, v)[1:]]

    assert_matches_truth(in_pieces, truth, (q, k, v))


def test_decoding_step_by_step_equals_the_whole() -> None:
    q, k, v = make_inputs(keys=20, dtype=torch.float32)
    recurrent = native(q, k, v, is_causal=True, form="recurrent")
    assert_close_to_truth(recurrent, truth_linear(q, k, v, is_causal=True))
    state, steps = None, []
    for i in range(20):
        out, state = native(*(x[:, :, i : i + 1] for x in (q, k, v)), initial_state=state, return_state=True)
        steps.append(out)
    assert_close_to_truth(torch.cat(steps, dim=2), recurrent.double())


def test_only_wanted_gradients_are_computed() -> None:
    q, k, v = make_inputs(keys=64, dtype=torch.float32)
    whole = evaluate(partial(native, is_causal=True), (q, k, v))[1]
    for i, x in enumerate((q, k, v)):
        inputs = [t.detach() for t in (q, k, v)]
        inputs[i] = x.detach().requires_grad_()
        out = native(*inputs, is_causal=True)
        upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float()
        (gradient,) = torch.autograd.grad(out, inputs[i], upstream)
        assert torch.equal(gradient, whole[i])


def test_the_same_bits_every_time_and_from_several_threads_at_once(thread_count: int, concurrently: Any) -> None:
    tensors = make_inputs(keys=700, heads=1, head_size=48, dtype=torch.float32)

    def call(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        outputs, gradients = evaluate(partial(native, is_causal=True), tensors)
        return outputs + gradients

    expected = call(tensors)
    for runs in concurrently(call, [tensors] * 3):
        for again in runs:
            assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_direct_is_refused_by_name_and_found_elsewhere_by_auto() -> None:
    q, k, v = make_inputs(dtype=torch.float32)
    with pytest.raises(BackendError, match="chunked"):
        native(q, k, v, form="direct")
    assert linattn.explain(q, k, v, kernel="elu+1").backend == "native"
    assert linattn.explain(q, k, v, kernel="elu+1", form="direct").backend == "reference"


@pytest.mark.slow
def test_every_instruction_set(again_on_an_instruction_set: Any) -> None:
    again = again_on_an_instruction_set("(test_outputs and 49) or test_every_map or test_every_layout or test_queries")
    assert again.status == 0, again.printed
    assert again.passed > 0, again.printed
    assert again.used == again.wanted
