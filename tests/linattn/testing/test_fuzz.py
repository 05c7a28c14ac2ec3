"""The fuzz passes what is right, and every kind of planted error fails it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

from linattn.cli.main import main
from linattn.kernels.common.op.backend import Backend
from linattn.kernels.quadratic import ops, reference
from linattn.testing import fuzz
from linattn.testing.random_calls import EXTENTS, OPS, draw, perform

TINY = EXTENTS["tiny"]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_passes(op: str) -> None:
    for seed in range(40):
        call = draw(op, seed, TINY, DTYPES)
        assert fuzz.judge(call, "reference") == fuzz.Verdict(), str(call)


@pytest.mark.parametrize("op", OPS)
def test_a_few_hundred_seeds_reach_every_option(op: str) -> None:
    calls = [draw(op, seed, EXTENTS["small"], DTYPES) for seed in range(300)]
    assert {c.layout for c in calls} == {"contiguous", "transposed", "fused", "strided", "expanded"}
    assert {c.is_causal for c in calls} == {c.masked for c in calls} == {c.dirty for c in calls} == {True, False}
    assert any(0 in c.lengths for c in calls)
    assert any(c.Hkv < c.H for c in calls)
    assert any(c.D != c.M for c in calls)
    assert any(c.q_offset and c.q_offset < 0 for c in calls)
    assert any(not c.needs_grad for c in calls)
    if op != "softmax":
        assert {c.form for c in calls} == {"direct", "chunked", "recurrent", "auto"}
        assert {c.past is None for c in calls} == {c.return_state for c in calls} == {True, False}


def _wrong_after(change: Callable[..., None]) -> int:
    """How many of 30 calls the fuzz rejects when `change` spoils the results."""

    def runner(call, backend, arguments, tensors):
        results = perform(call, backend, arguments, tensors)
        changed = [x.clone() if x.is_floating_point() else x for x in results]
        change(SimpleNamespace(call=call, out=changed[0], state=changed[2:], tensors=tensors))
        return [x.contiguous() if i else x for i, x in enumerate(changed)]

    return sum(bool(fuzz.judge(draw("quadratic", seed, TINY), "reference", runner=runner).wrong) for seed in range(30))


def test_the_runner_alone_changes_nothing() -> None:
    assert _wrong_after(lambda spoiled: None) == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: s.out.mul_(1 + 1e-4), id="output a little off"),
        pytest.param(lambda s: s.out[..., -1, :].fill_(float("nan")), id="a row left unwritten"),
        pytest.param(lambda s: s.out[0, 0, 0].zero_(), id="a row of zeros"),
        pytest.param(lambda s: s.out.add_(1e-3 * torch.rand(())), id="other bits every time"),
        pytest.param(lambda s: s.tensors["q"].detach().mul_(1.5), id="an input overwritten"),
    ],
)
def test_a_planted_error_is_found(change: Callable[..., None]) -> None:
    assert _wrong_after(change) >= 25


def test_a_wrong_state_is_found_where_there_is_one() -> None:
    with_state = sum(draw("quadratic", seed, TINY).return_state for seed in range(30))
    assert with_state >= 5
    assert _wrong_after(lambda s: [x.mul_(1.001) for x in s.state]) == with_state


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend of the quadratic op that is the reference with dk 1 % too large, and refuses M = 1."""
    module = ModuleType("planted")
    module.forward = reference.forward  # type: ignore[attr-defined]

    def backward(inputs):
        dq, dk, dv, dinitial = reference.backward(inputs)
        return dq, dk * 1.01, dv, dinitial

    module.backward = backward  # type: ignore[attr-defined]
    found = ops.implementation
    monkeypatch.setattr(ops, "implementation", lambda name: module if name == "planted" else found(name))
    refusal = lambda query: "M = 1 is beyond it" if query.M == 1 else ""  # noqa: E731
    monkeypatch.setitem(ops.BACKENDS, "planted", Backend(refusal))
    return module


def test_the_command_prints_what_repeats_a_failure(planted: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--backend", "planted", "--op", "quadratic", "--seconds", "8", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "gradient of k is off by" in printed
    assert "M = 1 is beyond it" in printed
    assert "next     --start" in printed
    again = next(line for line in printed.splitlines() if "python -m linattn fuzz" in line)
    words = shlex.split(again.split("python -m linattn ")[1])
    assert main(words) == 1
    repeated = capsys.readouterr().out
    assert again.strip() in repeated
    assert "0 passed, 1 failed" in repeated


def test_a_passing_run_has_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuzz", "--op", "softmax", "--seed", "3"]) == 0
    assert "1 passed, 0 failed, 0 refused" in capsys.readouterr().out
