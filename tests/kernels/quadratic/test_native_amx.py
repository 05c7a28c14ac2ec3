"""Quadratic attention in bf16 by AMX tiles, against the truth in float64 of the same bf16 inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn.kernels.common.op.backend import CAPABILITY
from linattn.testing import (
    LAYOUTS,
    assert_matches_truth,
    evaluate,
    make_inputs,
    make_key_mask,
    truth_quadratic,
)

pytestmark = [
    pytest.mark.skipif(CAPABILITY != "amx", reason=f"instruction set of the native kernels: {CAPABILITY}"),
    pytest.mark.usefixtures("poisoned"),
]
Tensors = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=["direct", "chunked"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(**options: Any) -> Tensors:
    return make_inputs(**({"heads": 4, "kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16} | options))


def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out = linattn.quadratic_attention(q, k, v, backend="native", enable_gqa=True, **options)
    assert isinstance(out, Tensor)
    return out


def assert_matches(tensors: Tensors, form: str, **options: Any) -> None:
    """Output and all gradients."""
    assert_matches_truth(lambda *t: run(*t, form=form, **options), lambda *t: truth_quadratic(*t, **options), tensors)


def everything(tensors: Tensors, form: str, **options: Any) -> list[Tensor]:
    outputs, gradients = evaluate(lambda *t: run(*t, form=form, **options), tensors)
    return outputs + gradients


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 129, 257, 500, 513, 1100])
def test_lengths(keys: int, is_causal: bool, form: str) -> None:
    assert_matches(inputs(keys=keys), form, is_causal=is_causal)


HEAD_SIZES = [(1, 1), (16, 16), (17, 64), (32, 32), (33, 40), (64, 7), (96, 31), (128, 128), (128, 64), (200, 256)]


@pytest.mark.parametrize(("D", "M"), HEAD_SIZES)
def test_head_sizes(D: int, M: int, form: str) -> None:
    assert_matches(inputs(keys=300, head_size=D, value_size=M, heads=2), form, is_causal=True)
    assert_matches(inputs(keys=600, head_size=D, value_size=M, heads=2, batch=1), form)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Any, form: str) -> None:
    assert_matches(inputs(keys=600, head_size=48, layout=layout, kv_heads=4), form, is_causal=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("coefficients", [(1, 2, 1), (1, 1, 0.5), (0, 0, 1), (3, -1, 0.25)])
def test_coefficients(coefficients: tuple[float, float, float], normalize: bool, form: str) -> None:
    for is_causal in (True, False):
        options = {"coefficients": coefficients, "normalize": normalize, "scale": -0.7}
        assert_matches(inputs(keys=700), form, is_causal=is_causal, **options)


def test_a_square_that_cannot_be_completed() -> None:
    """b = c1 / 2 c2 s would be 5e5 and more, and c2 (s + b)^2 would overflow or lose s."""
    assert_matches(inputs(keys=100), "direct", coefficients=(0, 1, 1e-6), normalize=False)
    assert_matches(inputs(keys=100), "direct", coefficients=(1, 1e-9, 1e-18))
    assert_matches(inputs(keys=100), "direct", scale=1e-12)


OFFSETS = [
    (70, 200, 130),
    (200, 70, -130),
    (90, 90, -3),
    (5, 1300, 1295),
    (1, 1000, 999),
    (100, 40, 500),
    (700, 600, 31),
    (1100, 1100, -128),
]


@pytest.mark.parametrize(("queries", "keys", "q_offset"), OFFSETS)
def test_offsets(queries: int, keys: int, q_offset: int, form: str) -> None:
    tensors = inputs(queries=queries, keys=keys, value_size=5)
    assert_matches(tensors, form, is_causal=True, q_offset=q_offset)
    assert_matches(tensors, form)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dead", [0, 600, 1090, 1100])
def test_masked_keys_do_not_count_whatever_they_hold(dead: int, is_causal: bool, form: str) -> None:
    """Also behind padding on the left, which leaves rows with fewer than 16 keys far from the start."""
    q, k, v = inputs(keys=1100)
    key_mask = make_key_mask(2, 1100)
    key_mask[0, :dead] = False
    options = {"key_mask": key_mask, "is_causal": is_causal}
    assert_matches((q, k, v), form, **options)
    masked = ~key_mask[:, None, :, None]
    dirty = (q, k.masked_fill(masked, float("nan")), v.masked_fill(masked, float("nan")))
    clean = everything((q, k, v), form, **options)
    for a, b in zip(clean, everything(dirty, form, **options), strict=True):
        assert torch.equal(a, b)
    assert not clean[2].masked_select(masked).any()
    assert not clean[3].masked_select(masked).any()


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_sequences(is_causal: bool, form: str) -> None:
    tensors = inputs(batch=1, keys=900, value_size=32)
    bounds = torch.tensor([0, 0, 1, 64, 64, 193, 900])
    assert_matches(tensors, form, is_causal=is_causal, cu_seqlens=bounds)
    assert_matches(tensors, form, is_causal=is_causal, cu_seqlens=bounds, key_mask=make_key_mask(1, 900))


def test_nan_stays_in_its_packed_sequence(form: str) -> None:
    q, k, v = inputs(batch=1, keys=730)
    options = {"is_causal": True, "cu_seqlens": torch.tensor([0, 50, 700, 730])}
    clean = everything((q, k, v), form, **options)
    for x in (q, k, v):
        x[:, :, 60] = float("nan")
    for a, b in zip(clean, everything((q, k, v), form, **options), strict=True):
        assert torch.equal(a[:, :, :50], b[:, :, :50])
        assert torch.equal(a[:, :, 700:], b[:, :, 700:])
        assert not b[:, :, 60].isfinite().all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (5, 5)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_share_few_and_many_heads(count: int, heads: int, kv_heads: int, form: str, threads: Any) -> None:
    threads(count)
    tensors = inputs(batch=1, heads=heads, kv_heads=kv_heads, keys=700, head_size=32)
    assert_matches(tensors, form, is_causal=True)
    assert_matches(tensors, form, key_mask=make_key_mask(1, 700))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_gradients_that_are_not_wanted(wanted: str, form: str) -> None:
    tensors = dict(zip("qkv", inputs(keys=600), strict=True))
    _, *every = everything(tuple(tensors.values()), form, is_causal=True)

    def with_some(*some: Tensor) -> Tensor:
        return run(*(tensors | dict(zip(wanted, some, strict=True))).values(), form=form, is_causal=True)

    _, gradients = evaluate(with_some, [tensors[name] for name in wanted])
    expected = dict(zip("qkv", every, strict=True))
    assert all(torch.equal(g, expected[name]) for name, g in zip(wanted, gradients, strict=True))


def test_rows_without_a_positive_sum_are_zero_with_zero_gradient() -> None:
    q, k, v = inputs(keys=100, head_size=1, value_size=3)
    q[:, :, ::3], k[:, :, :70] = 1.0, -1.0  # (1 + s)^2 = 0 for every third row, as far as it sees only these keys
    out, *gradients = everything((q, k, v), "direct", is_causal=True)
    dead = torch.zeros(100, dtype=torch.bool)
    dead[:70:3] = True
    assert not out[:, :, dead].any()
    assert not gradients[0][:, :, dead].any()
    assert out[:, :, ~dead].all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_same_bits_among_other_users_of_the_tiles(heads: int, form: str, threads: Any) -> None:
    """PyTorch's own bf16 kernels configure the same tiles, each in its own way, in the same threads."""
    threads(2)
    tensors = inputs(batch=1, heads=heads, kv_heads=1, keys=600, head_size=32)
    other = torch.randn(1, 2, 128, 64).bfloat16()

    def others() -> list[Tensor]:
        return [other @ other.mT, torch.nn.functional.scaled_dot_product_attention(other, other, other, is_causal=True)]

    first, first_others = everything(tensors, form, is_causal=True), others()
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(first_others, others(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, everything(tensors, form, is_causal=True), strict=True))


def test_concurrent_callers(form: str, concurrently: Any) -> None:
    work = [inputs(keys=300 + 150 * i, seed=i) for i in range(4)]

    def call(tensors: Tensors) -> list[Tensor]:
        return everything(tensors, form, is_causal=True)

    alone = [call(tensors) for tensors in work]
    for expected, runs in zip(alone, concurrently(call, work), strict=True):
        for again in runs:
            assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
