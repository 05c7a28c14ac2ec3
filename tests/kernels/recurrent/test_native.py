"""The native recurrence against the plain loop in float64: outputs, states and every gradient."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import linattn.rnn
from linattn.errors import BackendError, DoubleBackwardError
from linattn.kernels.common.op.backend import NATIVE_ABSENT
from linattn.kernels.recurrent.contract import CELLS
from linattn.recurrence import recur
from linattn.testing import relative_error
from tests.support.recurrent_calls import assert_nan_goes_nowhere, drawn, everything

pytestmark = [
    pytest.mark.skipif(bool(NATIVE_ABSENT), reason=NATIVE_ABSENT or "present"),
    pytest.mark.usefixtures("poisoned"),
]
FORWARD, GRADIENT = 1e-6, 2e-6


def assert_true(tensors: tuple[Tensor, ...], cell: str, lengths: Tensor | None = None, read: str = "both") -> None:
    found = everything(tensors, cell, "native", lengths, read)
    truth = everything(tensors, cell, "reference", lengths, read)
    for index, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert ours.isfinite().all()
        limit = FORWARD if index < len(found) - len(tensors) else GRADIENT
        assert relative_error(ours, true, floor=1e-6) <= limit, index


@given(
    cell=st.sampled_from(CELLS),
    B=st.integers(1, 30),
    T=st.integers(1, 20),
    H=st.integers(1, 40),
    initial=st.booleans(),
    padded=st.booleans(),
    read=st.sampled_from(["both", "all", "last"]),
    seed=st.integers(0, 99),
)
def test_any_call(cell: str, B: int, T: int, H: int, initial: bool, padded: bool, read: str, seed: int) -> None:
    lengths = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(seed)) if padded else None
    assert_true(drawn(cell, B, T, H, initial=initial, seed=seed), cell, lengths, read)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1, 1), (25, 3, 130), (53, 2, 64), (3, 129, 17), (2, 5, 300)])
def test_sizes_around_blocks_and_panels(cell: str, B: int, T: int, H: int) -> None:
    assert_true(drawn(cell, B, T, H), cell)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_inputs(cell: str) -> None:
    projected, *rest = drawn(cell, 5, 7, 9)
    time_first = projected.transpose(0, 1).contiguous().transpose(0, 1)
    every_other = torch.stack([projected, torch.full_like(projected, torch.nan)], -1)[..., 0]
    for view in (time_first, every_other, projected.expand(5, 7, -1)):
        assert_true((view, *rest), cell)


@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(cell: str) -> None:
    """exp of such sums overflows."""
    projected, *rest = drawn(cell, 3, 4, 6)
    if cell in ("tanh", "lstm"):
        assert_true((projected * 200, *rest), cell)


def test_tanh_keeps_its_digits_near_zero() -> None:
    z = torch.cat([torch.logspace(-30, 2, 2000), torch.linspace(0.5, 0.75, 500)])
    z = torch.cat([z, -z])[:, None, None]
    all_h, _ = recur(z, torch.zeros(1, 1), backend="native")
    assert ((all_h.double() - z.double().tanh()) / z.double().tanh()).abs().max() < 5e-7


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_padding_and_in_another_sequence_goes_nowhere(cell: str) -> None:
    assert_nan_goes_nowhere(drawn(cell, 6, 8, 5), cell, "native", torch.tensor([8, 1, 5, 3, 8, 2]))


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_for_every_number_of_threads_and_under_concurrency(cell: str) -> None:
    tensors = drawn(cell, 37, 12, 48)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(tensors, cell, "native"))
    finally:
        torch.set_num_threads(before)
    crowd = [threading.Thread(target=lambda: results.append(everything(tensors, cell, "native"))) for _ in range(4)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert len(results) == 7
    # The gradient of the weights is torch's product, whose order depends on the threads.
    for other in results[1:]:
        for index, (a, b) in enumerate(zip(results[0], other, strict=True)):
            is_weight = index == len(results[0]) - len(tensors) + 1
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5) if is_weight else torch.equal(a, b)


@pytest.mark.parametrize(("cell", "lengths"), [("tanh", None), ("lstm", torch.tensor([4, 2, 1]))])
def test_opcheck(cell: str, lengths: Tensor | None) -> None:
    projected, weight, h0, *c0 = drawn(cell, 3, 4, 5)
    inputs = (projected, weight, h0, c0[0] if c0 else None, lengths, cell)
    torch.library.opcheck(torch.ops.linattn.recurrent_fwd.default, (*inputs, True, "native"))
    all_h, last_h, last_c, *kept = torch.ops.linattn.recurrent_fwd(*inputs, True, "native")
    grad_outputs = (None, last_h, last_c if c0 else None)
    backward = (*grad_outputs, *inputs[1:5], all_h, *kept, cell, "native")
    torch.library.opcheck(torch.ops.linattn.recurrent_bwd.default, backward)


def test_compiles_in_one_graph() -> None:
    tensors = drawn("lstm", 3, 4, 5)

    def run(*xs: Tensor) -> Tensor:
        all_h, (h, c) = recur(xs[0], xs[1], xs[2:], cell="lstm")
        return all_h.square().sum() + (h * c).sum()

    plain, compiled = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    run(*plain).backward()
    torch.compile(run, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_what_the_native_recurrence_refuses() -> None:
    tensors = drawn("tanh", 2, 3, 4)
    with pytest.raises(BackendError, match=r"float64.*backend='auto' can"):
        recur(*(t.double() for t in tensors[:2]), backend="native")
    with pytest.raises(BackendError, match="function"):
        recur(*tensors[:2], cell=torch.sin, backend="native")
    with pytest.raises(BackendError, match="kept"):
        recur(*tensors[:2], kept=[], backend="native")
    with pytest.raises(BackendError, match=r"'cuda'.*accepted: .*'native', 'reference', 'triton'"):
        recur(*tensors[:2], backend="cuda")
    leaf = tensors[0].clone().requires_grad_()
    all_h, _ = recur(leaf, tensors[1], backend="native")
    (gradient,) = torch.autograd.grad(all_h.sum(), leaf, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="backend='reference' has all of them"):
        gradient.sum().backward()


def test_use_backend_reaches_layers() -> None:
    layer = linattn.rnn.RNNLayer(2, 3)
    x = torch.randn(2, 4, 2, requires_grad=True)

    def second_derivative() -> None:
        (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        gradient.sum().backward()

    with pytest.raises(DoubleBackwardError):
        second_derivative()
    with linattn.use_backend("reference"):
        second_derivative()
    with linattn.use_backend("torch"), pytest.raises(BackendError, match="'torch'"):
        layer(x)


def _capabilities() -> list[str]:
    if NATIVE_ABSENT:
        return []
    from linattn._native import capabilities

    return capabilities()


@pytest.mark.slow
@pytest.mark.skipif("LINATTN_CPU_CAPABILITY" in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("capability", [c for c in _capabilities() if c != "amx"])
def test_every_instruction_set(capability: str) -> None:
    """These tests again, on each set that the machine has; AMX computes no fp32, so the last is that of AVX-512."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "sizes or any_call or tanh",
    ]
    environment = {**os.environ, "LINATTN_CPU_CAPABILITY": capability}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
