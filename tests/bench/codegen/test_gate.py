"""The gate that needs no GPU: required kernels are compiled offline and their machine code is held to its limits.

Compiles instead of interpreting, so it runs in a process without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from linattn.bench.codegen import cases, command
from linattn.cli.main import main
from linattn.kernels.common.op.backend import INTERPRETED
from linattn.kernels.recurrent.contract import CELLS, ForwardInputs, GradOutputs, Saved, gates

if INTERPRETED:
    pytest.skip("kernels are interpreted here, not compiled: TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from linattn.bench.codegen.inspection import inspect_launch  # noqa: E402
from linattn.bench.codegen.limits import Limits, violations  # noqa: E402
from linattn.bench.codegen.machine_code import Inspection  # noqa: E402
from linattn.kernels.common.gpu.launch import Launch, recording  # noqa: E402


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


@pytest.mark.slow
def test_required_kernels_stay_within_their_limits() -> None:
    report = command.collect(command.ARCHITECTURES, command.OPERATIONS, required_only=True)
    assert len(report["rows"]) >= 25
    assert not command.broken(report), command.render(report)


LIMITS = Limits(issue=1.0, full_waits=1)


def launch(BLOCK_K: int = 64, D: int = 64, num_warps: int = 8, dtype: torch.dtype = torch.bfloat16) -> Launch:
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), torch.empty(4096, D, device="meta", dtype=dtype))
    sizes = {"N": 4096, "BLOCK_Q": 128, "BLOCK_K": BLOCK_K, "D": D}
    return Launch(squares, (32,), {**tensors, **sizes}, num_warps, num_stages=2)


def inspected(architecture: str, *sizes: int, **options: Any) -> Inspection:
    return inspect_launch(launch(*sizes, **options), architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_a_tile_has_the_flops_and_bytes_that_its_sizes_say(architecture: str) -> None:
    hot = inspected(architecture, num_warps=4).hot
    assert hot.flops == 2 * 128 * 64 * (64 + 64)
    assert hot.bytes_read == 64 * (64 + 64) * 2


@pytest.mark.parametrize(
    ("architecture", "kind"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "tcgen05"), ("gfx942", "MFMA")]
)
def test_matrix_instructions_are_found(architecture: str, kind: str) -> None:
    kernel = inspected(architecture)
    assert set(kernel.matrix) == {kind}
    assert kernel.hot.matrix > 0
    assert kernel.registers > 0
    assert kernel.shared_bytes > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_gate_passes_a_good_kernel(architecture: str) -> None:
    assert violations(inspected(architecture), LIMITS) == []


@pytest.mark.parametrize(("architecture", "sizes"), [("sm_80", (128, 128, 4)), ("sm_90", (64, 256, 4))])
def test_gate_rejects_a_planted_spill(architecture: str, sizes: tuple[int, int, int]) -> None:
    kernel = inspected(architecture, *sizes)
    assert kernel.spill_bytes > 0
    found = violations(kernel, LIMITS)
    assert any("bytes of registers spilled" in problem for problem in found)
    assert any("spilled registers in the hot loop" in problem for problem in found)


def test_gate_rejects_a_planted_serialisation() -> None:
    kernel = inspected("sm_90", BLOCK_K=128, num_warps=4)
    assert kernel.spill_bytes == 0, "serialised for another reason than spills"
    found = violations(kernel, LIMITS)
    assert any("serialized" in problem for problem in found)
    assert any("full waits in the hot loop" in problem for problem in found)


def test_gate_rejects_a_kernel_beside_the_matrix_unit() -> None:
    found = violations(inspected("sm_90", BLOCK_K=32, D=16, dtype=torch.float32), LIMITS)
    assert "no HGMMA instruction" in found


def test_gate_rejects_what_is_beyond_a_limit_of_its_own() -> None:
    kernel = inspected("sm_90")
    assert violations(kernel, LIMITS._replace(issue=0.1)) == [
        f"{kernel.hot.clocks.issue / kernel.hot.clocks.matrix:.2f} instructions per matrix clock, limit 0.10"
    ]
    assert len(violations(kernel, LIMITS._replace(full_waits=0))) == 1
    assert len(violations(kernel, LIMITS._replace(programs=99))) == 1


def one_bad_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the report consist of the serialised kernel above, required on sm_90."""
    case = cases.Case("softmax", "direct", "forward", "bf16", 64, True)
    monkeypatch.setattr(cases, "required", lambda: {(case, "sm_90")})
    monkeypatch.setattr(cases, "limits", lambda case, kernel: LIMITS)
    monkeypatch.setattr(command, "launches", lambda case, architecture: [launch(BLOCK_K=128, num_warps=4)])


def test_command_fails_with_a_bad_kernel_and_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_bad_kernel(monkeypatch)
    assert main(["kernels", "--required", "--arch", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert "softmax direct forward squares bf16 D=64 causal on sm_90: serialized" in out
    assert "0 of 1 required kernels within their limits" in out


def test_json_has_what_the_table_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one_bad_kernel(monkeypatch)
    assert main(["kernels", "--required", "--arch", "sm_90,sm_100", "--op", "softmax", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert report["note"] == "compiled offline; nothing was run on a GPU"
    assert row["configuration"] == "Q128 K128 w4 s2"
    assert row["serialized"]
    assert row["problems"]
    assert row["required"]
    assert row["flops_per_tile"] == 2 * 128 * 128 * (64 + 64)
    assert 0 < row["share"][0] < row["share"][1] < 1


def test_a_launcher_or_a_compiler_that_fails_is_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_launcher(case: cases.Case, architecture: str) -> list[Launch]:
        raise RuntimeError("no such tile")

    case = cases.Case("softmax", "direct", "forward", "bf16", 64, True)
    monkeypatch.setattr(command, "launches", broken_launcher)
    (row,) = command.inspect_case(case, "sm_90", required=True)
    assert row["problems"] == ["cannot be launched: RuntimeError: no such tile"]
    monkeypatch.setattr(command, "launches", lambda case, architecture: [launch(D=48)])
    (row,) = command.inspect_case(case, "sm_90", required=True)
    assert row["problems"][0].startswith("does not compile: ")
    assert command.render({"versions": {"linattn": "", "triton": ""}, "note": "", "rows": [row]})


@pytest.mark.parametrize("words", [["--arch", "sm_91"], ["--op", "sotfmax"], ["--jobs", "0"]])
def test_command_refuses_what_it_does_not_know(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *words]) == 2
    assert capsys.readouterr().err.startswith("linattn: ")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_recurrence_compile_and_spill_nothing(cell: str, architecture: str) -> None:
    from linattn.kernels.recurrent import gpu

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    B, H, G = 8, 256, gates(cell)
    h0, weight_h, c0 = meta(B, H), meta(G * H, H), meta(B, H) if cell == "lstm" else None
    lengths = torch.empty(B, device="meta", dtype=torch.int64)
    inputs = ForwardInputs(meta(B, 1, G * H), weight_h, h0, c0, lengths, cell)
    with recording() as launches:
        all_h, last_h, _, *saved = gpu.forward(inputs, True)
        gpu.backward(GradOutputs(all_h, last_h, c0), Saved(*inputs[1:5], all_h, *saved, cell))
    assert [each.kernel for each in launches] == [gpu.step_kernel, gpu.step_backward_kernel]
    for each in launches:
        assert inspect_launch(each, architecture).spill_bytes == 0
