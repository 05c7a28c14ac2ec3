"""The gate that needs no GPU: required kernels are compiled offline and their machine code is held to its limits.

Compiles instead of interpreting, so it runs in a process without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

from linattn.kernels.common.backend import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels are interpreted here, not compiled: TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from linattn.kernels.common.gpu.gate import Limits, violations  # noqa: E402
from linattn.kernels.common.gpu.launch import Launch  # noqa: E402
from linattn.kernels.common.gpu.machine_code import Reading  # noqa: E402
from linattn.kernels.common.gpu.reading import read  # noqa: E402


@triton.jit
def squares(q_ptr, k_ptr, v_ptr, out_ptr, N, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr):
    """out = (q k^T)^2 v: a kernel that is good or bad by the size of its tiles alone."""
    offs_q, offs_k, offs_d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K), tl.arange(0, D)
    rows = tl.program_id(0) * BLOCK_Q + offs_q
    q = tl.load(q_ptr + rows[:, None] * D + offs_d[None, :])
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    for j0 in range(0, N, BLOCK_K):
        tile = (j0 + offs_k)[:, None] * D + offs_d[None, :]
        s = tl.dot(q, tl.trans(tl.load(k_ptr + tile)), input_precision="ieee")
        acc = tl.dot((s * s).to(q.dtype), tl.load(v_ptr + tile), acc, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * D + offs_d[None, :], acc)


LIMITS = Limits(issue=1.0, full_waits=1)


def reading(
    architecture: str, BLOCK_K: int = 64, D: int = 64, num_warps: int = 8, dtype: torch.dtype = torch.bfloat16
) -> Reading:
    tensors = {
        name: torch.empty(4096, D, device="meta", dtype=dtype) for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    }
    arguments = {**tensors, "N": 4096, "BLOCK_Q": 128, "BLOCK_K": BLOCK_K, "D": D}
    return read(Launch(squares, (32,), arguments, num_warps, num_stages=2), architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_a_tile_has_the_flops_and_bytes_that_its_sizes_say(architecture: str) -> None:
    hot = reading(architecture, num_warps=4).hot
    assert hot.flops == 2 * 128 * 64 * (64 + 64)
    assert hot.bytes_read == 64 * (64 + 64) * 2


@pytest.mark.parametrize(
    ("architecture", "kind"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "tcgen05"), ("gfx942", "MFMA")]
)
def test_matrix_instructions_are_found(architecture: str, kind: str) -> None:
    kernel = reading(architecture)
    assert set(kernel.matrix) == {kind}
    assert kernel.hot.matrix > 0
    assert kernel.registers > 0 and kernel.shared_bytes > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_gate_passes_a_good_kernel(architecture: str) -> None:
    assert violations(reading(architecture), LIMITS) == []


@pytest.mark.parametrize(("architecture", "sizes"), [("sm_80", (128, 128, 4)), ("sm_90", (64, 256, 4))])
def test_gate_rejects_a_planted_spill(architecture: str, sizes: tuple[int, int, int]) -> None:
    kernel = reading(architecture, *sizes)
    assert kernel.spill_bytes > 0
    found = violations(kernel, LIMITS)
    assert any("bytes of registers spilled" in problem for problem in found)
    assert any("spilled registers in a loop" in problem for problem in found)


def test_gate_rejects_a_planted_serialisation() -> None:
    kernel = reading("sm_90", BLOCK_K=128, num_warps=4)
    assert kernel.spill_bytes == 0, "serialised for another reason than spills"
    found = violations(kernel, LIMITS)
    assert any("serialized" in problem for problem in found)
    assert any("full waits in the hot loop" in problem for problem in found)


def test_gate_rejects_a_kernel_beside_the_matrix_unit() -> None:
    found = violations(reading("sm_90", BLOCK_K=32, D=16, dtype=torch.float32), LIMITS)
    assert "no HGMMA instruction" in found


def test_gate_rejects_what_is_beyond_a_limit_of_its_own() -> None:
    kernel = reading("sm_90")
    assert violations(kernel, LIMITS._replace(issue=0.1)) == [
        f"{kernel.hot.clocks.issue / kernel.hot.clocks.matrix:.2f} instructions per matrix clock, limit 0.10"
    ]
    assert len(violations(kernel, LIMITS._replace(full_waits=0))) == 1
    assert len(violations(kernel, LIMITS._replace(programs=99))) == 1
