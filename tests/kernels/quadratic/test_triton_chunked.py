"""The chunked quadratic form in Triton: the truth agrees with it, in every option and configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn.kernels.common.op.backend import INTERPRETED, TRITON_ABSENT
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Plan
from linattn.kernels.quadratic.contract import Options
from linattn.testing import assert_close_to_truth, assert_matches_truth, make_key_mask, truth_quadratic
from tests.support.quadratic_calls import DTYPES, chunked, inputs, masked, truth
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]


def test_memory_is_poisoned() -> None:
    assert inputs()[0].new_empty(3).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_truth_in_every_dtype(dtype: torch.dtype, is_causal: bool) -> None:
    x = inputs(dtype=dtype)
    assert_matches_truth(chunked(is_causal=is_causal), truth(is_causal=is_causal), x)


@pytest.mark.parametrize(
    "how",
    [
        {"head_size": 32, "value_size": 16, "layout": "fused", "keys": 40},
        {"head_size": 20, "value_size": 33, "layout": "strided", "keys": 33},
        {"head_size": 16, "value_size": 16, "layout": "transposed", "heads": 4, "kv_heads": 2, "batch": 2, "keys": 37},
        {"keys": 1},
        {"keys": 15},
        {"keys": 129},
    ],
    ids=str,
)
def test_truth_in_every_shape(how: dict[str, Any]) -> None:
    x = inputs(dtype=torch.float32, **how)
    options = {"is_causal": True, "scale": 0.7}
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), x)


@pytest.mark.parametrize(("D", "M"), [(64, 128), (128, 64)])
def test_truth_in_large_heads(D: int, M: int) -> None:
    x = inputs(dtype=torch.float32, keys=40, head_size=D, value_size=M)
    assert_matches_truth(chunked(is_causal=True), truth(is_causal=True), x)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "coefficients": (1, 1, 0.5)},
        {"is_causal": False, "coefficients": (0, 0, 1)},
        {"is_causal": True, "coefficients": (0.5, -3, -2), "normalize": False},
        {"is_causal": False, "coefficients": (0.5, -3, -2), "normalize": False},
        {"is_causal": True, "scale": 0.0},
        {"is_causal": True, "scale": -1.5},
    ],
    ids=str,
)
def test_truth_with_every_polynomial(options: dict[str, Any]) -> None:
    x = inputs(dtype=torch.float32, keys=50)
    assert_matches_truth(chunked(**options), truth(**options), x)


@pytest.mark.parametrize("q_offset", [-40, -7, 5, 33, 100])
def test_truth_where_queries_and_keys_differ_in_number(q_offset: int) -> None:
    x = inputs(dtype=torch.float32, queries=45, keys=66)
    options = {"is_causal": True, "q_offset": q_offset}
    assert_matches_truth(chunked(**options), truth(**options), x)


# ---- masks and packed sequences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["some", "left padding", "few keys", "none"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_masked_keys_do_not_count(keep: str, is_causal: bool) -> None:
    q, k, v = inputs(dtype=torch.float32, batch=2, keys=80)
    mask = masked(keep, 80)
    spoiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
    options = {"is_causal": is_causal, "key_mask": mask}

    def of_real_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (k, v))
        return truth_quadratic(q, k, v, **options)

    assert_matches_truth(chunked(**options), of_real_keys, (q, *spoiled))


LENGTHS = (0, 5, 40, 0, 70, 17, 0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_sequences_know_nothing_of_each_other(is_causal: bool, with_mask: bool) -> None:
    cu_seqlens = torch.tensor(LENGTHS, device=DEVICE).cumsum(0)
    T = int(cu_seqlens[-1])
    q, k, v = inputs(dtype=torch.float32, keys=T, heads=2, kv_heads=1)
    mask = make_key_mask(1, T, keep=0.5).to(DEVICE) if with_mask else None
    cu_seqlens = torch.nn.functional.pad(cu_seqlens, (1, 0)).int()
    options = {"is_causal": is_causal, "cu_seqlens": cu_seqlens, "key_mask": mask}
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), (q, k, v))


def test_nan_stays_in_its_sequence() -> None:
    q, k, v = inputs(dtype=torch.float32, keys=90)
    cu_seqlens = torch.tensor([0, 41, 90], device=DEVICE, dtype=torch.int32)
    for x in (q, k, v):
        x[:, :, 41:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = chunked(is_causal=True, cu_seqlens=cu_seqlens)(*leaves)
    gradients = torch.autograd.grad(out[:, :, :41].sum() + 0 * out[:, :, 41:].nan_to_num().sum(), leaves)
    assert out[:, :, :41].isfinite().all()
    assert all(g[:, :, :41].isfinite().all() for g in gradients)


# ---- configurations --------------------------------------------------------------------------------------------------


def configurations() -> list[tuple[str, torch.dtype, int]]:
    if TRITON_ABSENT:
        return []
    from linattn.kernels.quadratic.gpu.config import CONFIGURATIONS

    dtypes = {2: torch.bfloat16, 4: torch.float32}
    return [(name, dtypes[itemsize], size) for name, itemsize, size in CONFIGURATIONS]


@pytest.mark.skipif(not INTERPRETED, reason="other architectures' tiles need not fit this device")
@pytest.mark.parametrize(("architecture", "dtype", "head_size"), configurations(), ids=str)
def test_every_configuration(architecture: str, dtype: torch.dtype, head_size: int) -> None:
    """Chunks as short as tiles allow, and a sequence of little more than one."""
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.quadratic.gpu import backward, config, forward

    chunk = config.configuration(architecture, dtype, head_size).chunk_unit
    q, k, v = inputs(dtype=dtype, keys=chunk + 20, head_size=head_size, value_size=16)
    options, plan = Options(True, 0, 1.0, 1.0, 2.0, 1.0, True), Plan("chunked", "triton", 1)
    dout = torch.randn_like(v)
    with as_architecture(architecture):
        out, sums, _, saved = forward(ForwardInputs(q, k, v, None, None, [], options, False, True, plan))
        inputs_of_it = (dout, [], q, k, v, out, sums, saved, None, None, [], options, [True] * 4, plan)
        gradients = backward(BackwardInputs(*inputs_of_it))[:3]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true = truth_quadratic(*leaves, is_causal=True)
    assert_close_to_truth(out, true.detach())
    for ours, expected in zip(gradients, torch.autograd.grad(true, leaves, dout.double()), strict=True):
        assert_close_to_truth(ours, expected, gradient=True)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_run_names_what_can() -> None:
    large = inputs(dtype=torch.float32, keys=3, head_size=160)
    with pytest.raises(linattn.errors.BackendError, match="only in the direct form"):
        chunked()(*large)
    with pytest.raises(linattn.errors.BackendError, match="only in the direct form"):
        chunked(form="direct", return_state=True)(*large)
    with pytest.raises(linattn.errors.BackendError, match="form='chunked'"):
        chunked(form="recurrent", is_causal=True)(*inputs(dtype=torch.float32))
