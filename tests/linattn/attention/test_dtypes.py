"""Low precision, autocast, and dtypes that are refused."""

from __future__ import annotations

import pytest
import torch

import linattn
from linattn.errors import DtypeError
from linattn.testing import (
    assert_close_to_truth,
    assert_matches_truth,
    evaluate,
    make_inputs,
    relative_error,
    truth_argmax,
    truth_quadratic,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_forward_and_gradients_within_the_budget(operation, dtype: torch.dtype, is_causal: bool) -> None:
    if operation.causal_only and not is_causal:
        pytest.skip("this form is causal only")
    q, k, v = make_inputs(
        keys=33 if operation.causal_only else 129, head_size=16, value_size=5, dtype=dtype, layout="transposed"
    )
    out = operation.run(q, k, v, is_causal=is_causal)
    assert out.dtype == dtype
    assert_matches_truth(
        lambda *t: operation.run(*t, is_causal=is_causal),
        lambda *t: operation.truth(*t, is_causal=is_causal),
        (q, k, v),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once_at_the_end(operation, dtype: torch.dtype) -> None:
    """A twentieth more error than rounding the true tensor to the dtype: the reference sums and divides in float32."""
    q, k, v = make_inputs(keys=33, head_size=16, value_size=5, dtype=dtype)
    with linattn.use_backend("reference"):
        (out,), (_, _, dv) = evaluate(lambda *t: operation.run(*t, is_causal=True), (q, k, v))
    (true_out,), (_, _, true_dv) = evaluate(
        lambda *t: operation.truth(*t, is_causal=True), [t.double() for t in (q, k, v)], upstream_dtype=dtype
    )
    for actual, truth in ((out, true_out), (dv, true_dv)):
        assert relative_error(actual, truth) <= 1.05 * relative_error(truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_picks_in_every_dtype(dtype: torch.dtype) -> None:
    q, k, v = make_inputs(queries=9, keys=40, value_size=5, dtype=dtype)
    out = linattn.argmax_attention(q, k, v)
    assert out.dtype == dtype
    assert (out == truth_argmax(q, k, v).to(dtype)).double().mean() > 0.95


def test_autocast_casts_to_its_dtype(operation) -> None:
    q, k, v = make_inputs(keys=30, value_size=5, dtype=torch.float32)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = operation.run(*leaves, is_causal=True)
    assert out.dtype == torch.bfloat16
    cast = operation.run(*(t.bfloat16() for t in (q, k, v)), is_causal=True)
    assert torch.equal(out, cast)
    out.sum().backward()
    assert {leaf.grad.dtype for leaf in leaves} == {torch.float32}
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_autocast_reconciles_mixed_dtypes(operation) -> None:
    q, k, v = make_inputs(keys=30, value_size=5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = operation.run(q, k.bfloat16(), v.half(), is_causal=True)
        assert torch.equal(mixed, operation.run(q, k, v.half(), is_causal=True))
    with torch.autocast("cpu", enabled=False):
        assert operation.run(q, k, v, is_causal=True).dtype == torch.float32


def test_autocast_leaves_states_in_float32(stateful) -> None:
    q, k, v = make_inputs(keys=30, value_size=5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = stateful.run(q, k, v, is_causal=True, return_state=True)
        out, again = stateful.run(q, k, v, is_causal=True, initial_state=state, return_state=True)
    assert {t.dtype for t in (*state[1:], *again[1:])} == {torch.float32}
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("position", [0, 1, 2])
def test_mixed_dtypes_are_refused(operation, position: int) -> None:
    tensors = list(make_inputs(dtype=torch.float32))
    tensors[position] = tensors[position].double()
    with pytest.raises(DtypeError, match=r"float64.*float32|float32.*float64"):
        operation.run(*tensors, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_numbers_that_are_not_real_floats_are_refused(operation, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in make_inputs(dtype=torch.float32)]
    with pytest.raises(DtypeError, match=str(dtype).removeprefix("torch.")):
        operation.run(*tensors, is_causal=True)


def test_float64_is_computed_in_float64() -> None:
    q, k, v = make_inputs(keys=100)
    for form in ("direct", "chunked"):
        out = linattn.quadratic_attention(q, k, v, is_causal=True, form=form)
        assert_close_to_truth(out, truth_quadratic(q, k, v, is_causal=True))
