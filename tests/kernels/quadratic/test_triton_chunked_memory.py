"""The workspace of the chunked quadratic form in Triton: groups of heads, and states that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.kernels.common.op.stateful import ForwardInputs, Plan
from linattn.kernels.quadratic.contract import Options
from tests.support.quadratic_calls import chunked, inputs, parts_of_state
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]


def everything(*x: Tensor, **options: Any) -> list[Tensor]:
    """Output, state and gradients, those through the initial state among them."""
    leaves = [t.clone().requires_grad_() for t in x]
    how = {"is_causal": True, "enable_gqa": True, "return_state": True}
    past, state = chunked(**how)(*(t[:, :, :40] for t in leaves)) if not options else (leaves[0][:0], None)
    out, after = chunked(**how, **options, initial_state=state)(*leaves)
    loss = out.float().square().sum() + sum(t.square().sum() for t in parts_of_state(after)) + past.float().sum()
    return [out.detach(), *(t.detach() for t in after), *torch.autograd.grad(loss, leaves)]


def launched(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that a call runs."""
    from linattn.kernels.common.gpu.launch import launch
    from linattn.kernels.quadratic.gpu import (
        bwd_preprocess,
        cancelled_dkv,
        chunk_dkv,
        chunk_dq,
        chunk_output,
        chunk_state,
        chunk_state_scan,
    )

    names: list[str] = []

    def note(kernel: Any, *grid: Any, **arguments: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *grid, **arguments)

    with monkeypatch.context() as patch:
        for module in (bwd_preprocess, cancelled_dkv, chunk_dkv, chunk_dq, chunk_output, chunk_state, chunk_state_scan):
            patch.setattr(module, "launch", note)
        call()
    return names


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "at_once"), [(1, 4, 2, 1), (3, 2, 1, 2)])
def test_groups_of_heads_change_no_bit(
    batch: int, heads: int, kv_heads: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace for `at_once` key heads. Were runs cut by those of a group, sums would have another order."""
    x = inputs(dtype=torch.bfloat16, batch=batch, heads=heads, kv_heads=kv_heads, keys=140)
    monkeypatch.setenv("LINATTN_KEEP_SUMS", "never")
    whole = everything(*x)
    names = launched(lambda: chunked(is_causal=True, enable_gqa=True)(*x), monkeypatch)
    from linattn.kernels.quadratic.gpu import workspace

    monkeypatch.setattr(workspace, "_bytes_of_head", lambda problem: 1000)
    monkeypatch.setenv("LINATTN_WORKSPACE", str(1000 * at_once))
    for ours, expected in zip(everything(*x), whole, strict=True):
        assert torch.equal(ours, expected)
    groups = -(-batch * kv_heads // at_once)
    assert names * groups == launched(lambda: chunked(is_causal=True, enable_gqa=True)(*x), monkeypatch)


def test_groups_of_heads_of_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(dtype=torch.float32, heads=2, keys=100)
    cu_seqlens = torch.tensor([0, 30, 30, 100], device=DEVICE, dtype=torch.int32)
    whole = everything(*x, cu_seqlens=cu_seqlens)
    monkeypatch.setenv("LINATTN_WORKSPACE", "1")
    for ours, expected in zip(everything(*x, cu_seqlens=cu_seqlens), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_states_that_are_kept_change_no_bit(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And save their kernels in the backward pass."""
    x = [t.requires_grad_() for t in inputs(dtype=torch.bfloat16, heads=2, kv_heads=1, keys=70)]
    runs: list[tuple[Tensor, ...]] = []
    names = {}
    for setting in ("always", "never"):
        monkeypatch.setenv("LINATTN_KEEP_SUMS", setting)
        out = chunked(is_causal=is_causal, enable_gqa=True)(*x)
        loss = out.float().square().sum()
        names[setting] = launched(lambda loss=loss: runs.append(torch.autograd.grad(loss, x)), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    state = ["chunk_products_kernel", "chunk_moments_kernel", "state_scan_kernel"]
    after = [*state, "chunk_dkv_kernel", "chunk_dkv_kernel", "cancelled_dkv_kernel"]
    assert names["always"] == ["bwd_preprocess_kernel", "chunk_dq_kernel", *after]
    assert names["never"] == ["bwd_preprocess_kernel", *state, "chunk_dq_kernel", *after]


def test_description_counts_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.quadratic.gpu import describe

    q = torch.empty(1, 8, 65536, 64, dtype=torch.bfloat16, device="meta")
    with as_architecture("sm_90"):
        assert "4 launches forward, 8 backward (sums kept)" in describe(q, q, q, True, "chunked")
        monkeypatch.setenv("LINATTN_KEEP_SUMS", "never")
        assert "4 launches forward, 11 backward (sums made again)" in describe(q, q, q, True, "chunked")
        monkeypatch.setenv("LINATTN_WORKSPACE", "1")
        assert "in 8 groups of heads" in describe(q, q, q, True, "chunked")


def test_rule_for_keeping_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that takes less time than to make them again, beside q, k, v and out that are not much smaller."""
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.quadratic.gpu import workspace
    from linattn.kernels.quadratic.gpu.kernel_args import ChunkedProblem

    def kept(D: int, N: int = 65536, chunk: int = 0) -> bool:
        q = torch.empty(1, 8, N, D, dtype=torch.bfloat16, device="meta")
        options, plan = Options(True, 0, 1.0, 1.0, 2.0, 1.0, True), Plan("chunked", "triton", chunk)
        given = ForwardInputs(q, q, q, None, None, [], options, False, True, plan)
        with as_architecture("sm_90"):
            return workspace.keeps_states(ChunkedProblem.of(given))

    assert kept(64)  # 1.4 times q, k, v and out
    assert not kept(128)  # 2.5 times
    assert kept(128, chunk=2048)
    assert not kept(64, chunk=256)  # 128 flops a byte, twice: less than the chip's 184
    assert not kept(64, N=2**20)  # beyond the workspace
    monkeypatch.setenv("LINATTN_KEEP_SUMS", "always")
    assert kept(128)
    monkeypatch.setenv("LINATTN_KEEP_SUMS", "never")
    assert not kept(64)


def test_an_empty_sequence_at_the_front_reads_nothing_before_the_tensor() -> None:
    """Its tiles begin before it where q_offset is negative. What lies before q here would overflow."""
    q, k, v = inputs(keys=4, dtype=torch.float32)
    around = torch.full((1, 1, 40, q.shape[3]), 1e30, device=DEVICE)
    around[:, :, 20:24] = q
    lengths = torch.tensor([0, 0, 0, 4], dtype=torch.int32, device=DEVICE)
    run = chunked(is_causal=True, q_offset=-2, cu_seqlens=lengths, normalize=False)
    assert torch.equal(run(around[:, :, 20:24], k, v), run(q, k, v))
