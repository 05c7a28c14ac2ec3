"""Softmax on the Triton kernels, on a GPU or in the interpreter, against the truth in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn import testing
from linattn.errors import ArgumentError
from tests.support.triton_device import CUDA, DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]
softmax = partial(linattn.softmax_attention, backend="triton")


def check(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    gqa = tensors[0].shape[1] != tensors[1].shape[1]
    run, truth = partial(softmax, enable_gqa=gqa, **options), partial(testing.truth_softmax, **options)
    testing.assert_matches_truth(run, truth, tensors)


def inputs(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return testing.make_inputs(**{"dtype": torch.float32, "device": DEVICE, "batch": 1, "score_std": 2.0} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 15, 63, 129])
def test_lengths_and_dtypes(length: int, is_causal: bool, dtype: torch.dtype) -> None:
    check(inputs(keys=length, head_size=16, value_size=24, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_with_shared_heads(layout: testing.Layout) -> None:
    tensors = inputs(batch=2, keys=40, heads=4, kv_heads=2, head_size=20, value_size=8, layout=layout)
    check(tensors, is_causal=True, scale=-0.5)
    out = softmax(*tensors, enable_gqa=True)
    assert (out.stride(1) < out.stride(2)) == (layout in ("transposed", "fused"))


@pytest.mark.parametrize("q_offset", [-20, -3, 0, 11, 50])
def test_offsets(q_offset: int) -> None:
    check(inputs(queries=35, keys=50), is_causal=True, q_offset=q_offset)


def test_rows_without_keys_are_zero() -> None:
    q, k, v = inputs(keys=40)
    out, lse = torch.ops.linattn.softmax_fwd(q, k, v, None, None, True, -18, 1.0, "triton")
    assert (out[:, :, :18] == 0).all()
    assert (lse[:, :, :18] == -torch.inf).all()
    assert (lse[:, :, 18:] > -torch.inf).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_leaks_out_of_padding(is_causal: bool) -> None:
    q, k, v = inputs(batch=2, keys=50)
    key_mask = testing.make_key_mask(2, 50).to(DEVICE)
    key_mask[1, :20] = False
    check((q, k, v), key_mask=key_mask, is_causal=is_causal)
    hidden = ~key_mask[:, None, :, None]
    leaves = [q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)]
    _, (dq, dk, dv) = testing.evaluate(partial(softmax, key_mask=key_mask, is_causal=is_causal), leaves)
    assert all(x.isfinite().all() for x in (dq, dk, dv))
    assert (dk.masked_select(hidden) == 0).all()
    assert (dv.masked_select(hidden) == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's arithmetic within the spoilt sequence
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(is_causal: bool) -> None:
    q, k, v = inputs(keys=90, heads=2, kv_heads=1)
    cu_seqlens = torch.tensor([0, 0, 33, 34, 34, 80, 90, 90], dtype=torch.int32, device=DEVICE)
    mask = testing.make_key_mask(1, 90).to(DEVICE)
    check((q, k, v), is_causal=is_causal, cu_seqlens=cu_seqlens)
    check(
        (q, k, v), is_causal=is_causal, cu_seqlens=cu_seqlens.long(), key_mask=mask, q_offset=1 if is_causal else None
    )
    for x in (q, k, v):
        x[:, :, 34:80] = torch.nan
    out, gradients = testing.evaluate(partial(softmax, cu_seqlens=cu_seqlens, enable_gqa=True), (q, k, v))
    assert all(x[:, :, [*range(34), *range(80, 90)]].isfinite().all() for x in (*out, *gradients))


@pytest.mark.skipif(CUDA, reason="on a GPU an asynchronous assertion, which ends the process")
@pytest.mark.parametrize("bounds", [[1, 10], [0, 9], [0, 7, 5, 10]])
def test_bounds_that_are_none(bounds: list[int]) -> None:
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        softmax(*inputs(keys=10), cu_seqlens=torch.tensor(bounds))


def test_large_scores_do_not_overflow() -> None:
    check(inputs(keys=40, score_std=300.0), is_causal=True)


def test_results_repeat_bit_by_bit() -> None:
    tensors = inputs(keys=70, dtype=torch.bfloat16)
    once, again = (testing.evaluate(partial(softmax, is_causal=True), tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once[0] + once[1], again[0] + again[1], strict=True))


def test_auto_takes_pytorchs_kernels_where_they_can() -> None:
    """On a GPU; in the interpreter auto never takes Triton."""
    call = partial(linattn.explain, *inputs(keys=8), kernel="softmax", is_causal=True)
    assert call().backend == "torch"
    if CUDA:
        assert call(key_mask=torch.ones(1, 8, dtype=torch.bool, device=DEVICE)).backend == "triton"
    assert "direct tiles" in call(backend="triton").runs
