"""The direct form of quadratic attention by the native kernels, forward and backward, against the truth in float64."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn.kernels.common.op.backend import NATIVE_ABSENT
from linattn.testing import (
    LAYOUTS,
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    make_key_mask,
    truth_quadratic,
)

pytestmark = [pytest.mark.skipif(bool(NATIVE_ABSENT), reason=NATIVE_ABSENT), pytest.mark.usefixtures("poisoned")]

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    out = linattn.quadratic_attention(q, k, v, form="direct", backend="native", enable_gqa=gqa, **options)
    assert isinstance(out, Tensor)
    return out


def assert_matches(tensors: tuple[Tensor, Tensor, Tensor], **options: Any) -> None:
    """Output and all gradients."""
    assert_matches_truth(lambda *t: run(*t, **options), lambda *t: truth_quadratic(*t, **options), tensors)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 63, 64, 65, 129, 500])
def test_lengths(keys: int, is_causal: bool) -> None:
    assert_matches(make_inputs(keys=keys, head_size=16, value_size=24, dtype=FLOAT32), is_causal=is_causal)


HEAD_SIZES = [(1, 1), (2, 3), (7, 250), (15, 17), (16, 16), (31, 5), (32, 48), (64, 64), (80, 112), (256, 255)]


@pytest.mark.parametrize(("D", "M"), HEAD_SIZES)
def test_head_sizes(D: int, M: int) -> None:
    assert_matches(make_inputs(keys=140, head_size=D, value_size=M, dtype=FLOAT32), is_causal=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_dtypes_and_layouts(dtype: torch.dtype, layout: Any) -> None:
    assert_matches(make_inputs(keys=150, head_size=24, value_size=40, layout=layout, dtype=dtype), is_causal=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficients", [(1, 2, 1), (1, 1, 0.5), (0, 0, 1), (3, -1, 0.25)])
def test_coefficients(coefficients: tuple[float, float, float], normalize: bool) -> None:
    tensors = make_inputs(keys=100, dtype=FLOAT32)
    for is_causal in (True, False):
        assert_matches(tensors, is_causal=is_causal, coefficients=coefficients, normalize=normalize, scale=-0.7)


def test_similarities_of_any_sign_without_normalising() -> None:
    tensors = make_inputs(keys=100, dtype=FLOAT32)
    assert_matches(tensors, is_causal=True, coefficients=(-1, 0.5, -2), normalize=False)


def test_scores_far_from_the_root_keep_their_digits_without_normalising() -> None:
    """c2 (s + b)^2 + r with b = c1 / 2 c2 = 5e5 would lose s: that form is for normalised rows only."""
    assert_matches(make_inputs(keys=60, dtype=FLOAT32), coefficients=(0, 1, 1e-6), normalize=False)


OFFSETS = [(70, 200, 130), (200, 70, -130), (90, 90, -3), (5, 300, 295), (1, 1000, 999), (100, 40, 500)]


@pytest.mark.parametrize(("queries", "keys", "q_offset"), OFFSETS)
def test_offsets(queries: int, keys: int, q_offset: int) -> None:
    tensors = make_inputs(queries=queries, keys=keys, value_size=5, dtype=FLOAT32)
    assert_matches(tensors, is_causal=True, q_offset=q_offset)
    assert_matches(tensors)


@pytest.mark.parametrize("is_causal", [True, False])
def test_masked_keys_do_not_count_whatever_they_hold(is_causal: bool) -> None:
    q, k, v = make_inputs(keys=200, value_size=5, dtype=FLOAT32)
    options = {"key_mask": make_key_mask(2, 200), "is_causal": is_causal}
    assert_matches((q, k, v), **options)
    outputs, gradients = evaluate(lambda *t: run(*t, **options), (q, k, v))
    masked = ~options["key_mask"][:, None, :, None]
    dirty = (q, k.masked_fill(masked, float("nan")), v.masked_fill(masked, float("nan")))
    dirty_outputs, dirty_gradients = evaluate(lambda *t: run(*t, **options), dirty)
    for a, b in zip(outputs + gradients, dirty_outputs + dirty_gradients, strict=True):
        assert torch.equal(a, b)
    assert not gradients[1].masked_select(masked).any()
    assert not gradients[2].masked_select(masked).any()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_sequences(is_causal: bool, index_dtype: torch.dtype) -> None:
    tensors = make_inputs(batch=1, heads=4, kv_heads=2, keys=260, value_size=5, dtype=FLOAT32)
    bounds = torch.tensor([0, 0, 1, 64, 64, 193, 260], dtype=index_dtype)
    assert_matches(tensors, is_causal=is_causal, cu_seqlens=bounds)
    assert_matches(tensors, is_causal=is_causal, cu_seqlens=bounds, key_mask=make_key_mask(1, 260))


def test_nan_stays_in_its_packed_sequence() -> None:
    q, k, v = make_inputs(batch=1, keys=130, dtype=FLOAT32)
    options = {"is_causal": True, "cu_seqlens": torch.tensor([0, 50, 100, 130])}
    clean = evaluate(lambda *t: run(*t, **options), (q, k, v))
    for x in (q, k, v):
        x[:, :, 60] = float("nan")
    dirty = evaluate(lambda *t: run(*t, **options), (q, k, v))
    for a, b in zip(itertools.chain(*clean), itertools.chain(*dirty), strict=True):
        assert torch.equal(a[:, :, :50], b[:, :, :50])
        assert torch.equal(a[:, :, 100:], b[:, :, 100:])
        assert not b[:, :, 60].isfinite().all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (5, 5)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_share_few_and_many_heads(count: int, heads: int, kv_heads: int, threads: Any) -> None:
    threads(count)
    tensors = make_inputs(batch=1, heads=heads, kv_heads=kv_heads, keys=300, head_size=20, dtype=FLOAT32)
    assert_matches(tensors, is_causal=True)
    assert_matches(tensors, key_mask=make_key_mask(1, 300))


def test_keys_beyond_one_region(threads: Any) -> None:
    """Packed keys of all heads together pass the limit, so that heads are worked off in several parallel regions."""
    threads(2)
    tensors = make_inputs(batch=1, heads=3, queries=200, keys=40_000, head_size=64, dtype=FLOAT32)
    assert_close_to_truth(run(*tensors), truth_quadratic(*tensors))


@pytest.mark.parametrize("wanted", [names for n in (1, 2) for names in itertools.combinations("qkv", n)])
@pytest.mark.parametrize("heads", [2, 1])
def test_gradients_that_are_not_wanted(wanted: tuple[str, ...], heads: int, threads: Any) -> None:
    threads(2)
    tensors = dict(zip("qkv", make_inputs(heads=heads, keys=150, dtype=FLOAT32), strict=True))
    _, everything = evaluate(lambda *t: run(*t, is_causal=True), tuple(tensors.values()))

    def with_some(*some: Tensor) -> Tensor:
        return run(*(tensors | dict(zip(wanted, some, strict=True))).values(), is_causal=True)

    _, gradients = evaluate(with_some, [tensors[name] for name in wanted])
    expected = dict(zip("qkv", everything, strict=True))
    assert all(torch.equal(g, expected[name]) for name, g in zip(wanted, gradients, strict=True))


def test_rows_without_a_positive_sum_are_zero_with_zero_gradient() -> None:
    q, k, v = make_inputs(keys=100, head_size=1, value_size=3, dtype=FLOAT32)
    q[:, :, ::3], k[:, :, :70] = 1.0, -1.0  # (1 + s)^2 = 0 for every third row, as far as it sees only these keys
    (out,), gradients = evaluate(lambda *t: run(*t, is_causal=True), (q, k, v))
    dead = torch.zeros(100, dtype=torch.bool)
    dead[:70:3] = True
    assert not out[:, :, dead].any()
    assert not gradients[0][:, :, dead].any()
    assert out[:, :, ~dead].all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_every_number_of_a_short_type_is_read_and_rounded_right(dtype: torch.dtype) -> None:
    """With q = 0 and one key the row is c0 v, from the one product to the one rounding."""
    v = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 256, 1, 256)
    zero = torch.zeros(1, 256, 1, 1, dtype=dtype)
    for c0 in (1.0, 1.1, 2.0**-5, 1.7e-3, 300.0):
        out = run(zero, zero, v, coefficients=(c0, 0, 1), normalize=False)
        assert torch.equal(out.nan_to_num(3.0), (v.float() * torch.tensor(c0)).to(dtype).nan_to_num(3.0))
        assert torch.equal(out.isnan(), v.isnan())


def everything(tensors: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    outputs, gradients = evaluate(lambda *t: run(*t, is_causal=True), tensors)
    return outputs + gradients


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_the_same_bits_again(heads: int, threads: Any) -> None:
    """Whoever comes first takes the next rows, but that must not show."""
    threads(3)
    tensors = make_inputs(batch=1, heads=heads, kv_heads=1, keys=400, head_size=16, dtype=FLOAT32)
    first = everything(tensors)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(tensors), strict=True))


def test_concurrent_callers(concurrently: Any) -> None:
    work = [make_inputs(keys=120 + 50 * i, head_size=16, dtype=FLOAT32, seed=i) for i in range(4)]
    alone = [everything(tensors) for tensors in work]
    for expected, runs in zip(alone, concurrently(everything, work), strict=True):
        for again in runs:
            assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_worker_can_compute(in_a_process: Any) -> None:
    """Its parent has run parallel regions, whose threads the worker does not have."""
    program = """
import json, multiprocessing, torch, linattn
from linattn.testing import evaluate, make_inputs
inputs = make_inputs(keys=300, dtype=torch.float32)
def compute():
    attend = lambda *t: linattn.quadratic_attention(*t, is_causal=True, form="direct", backend="native")
    return [x.tolist() for part in evaluate(attend, inputs) for x in part]
torch.set_num_threads(2)
here = compute()
def work(queue):
    torch.set_num_threads(1)
    queue.put(compute())
context = multiprocessing.get_context("fork")
queue = context.Queue()
worker = context.Process(target=work, args=(queue,))
worker.start()
there = queue.get(timeout=60)
worker.join()
print(json.dumps([here, there]))
"""
    here, there = json.loads(in_a_process(program))
    assert len(here) == 4
    assert here == there


@pytest.mark.slow
def test_every_instruction_set(again_on_an_instruction_set: Any) -> None:
    """Sizes at the edges of vectors, panels and strips."""
    again = again_on_an_instruction_set(
        "test_lengths or test_head_sizes or test_offsets or (test_dtypes and transposed)"
    )
    assert again.status == 0, again.printed
    assert again.passed > 0, again.printed
    assert again.used == again.wanted
