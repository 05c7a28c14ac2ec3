"""Timing, errors of timed outputs and memory: what a row says is what happened."""

from __future__ import annotations

import sys

import pytest
import torch

from linattn.bench.measuring import cases, timing
from linattn.bench.measuring import measure as measuring
from linattn.bench.measuring.accuracy import judged_queries, truth_of
from linattn.bench.measuring.cases import (
    ELU_CHUNKED,
    QUADRATIC_CHUNKED,
    QUADRATIC_DIRECT,
    SDPA,
    SOFTMAX,
    Method,
    Problem,
)
from linattn.bench.measuring.measure import measure, select_affordable, useful_gflops
from linattn.bench.measuring.memory import MemoryProbe
from linattn.bench.measuring.results import Measurement
from linattn.bench.peers import implementations
from linattn.errors import ArgumentError
from linattn.kernels.common.op.backend import NATIVE_ABSENT
from linattn.testing import BUDGETS

CPU = torch.device("cpu")
METHODS = (SDPA, SOFTMAX, QUADRATIC_DIRECT, QUADRATIC_CHUNKED, ELU_CHUNKED)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("direction", ["forward", "training"])
@pytest.mark.parametrize("N", [33, 1100])
def test_every_method_is_measured_and_right(N: int, direction: str, is_causal: bool) -> None:
    problem = Problem(N, 8, 8, H=2, is_causal=is_causal, direction=direction)
    measurements = measure(problem, METHODS, device=CPU, budget_s=0.0)
    budget = BUDGETS[torch.float32]
    assert [measurement.method for measurement in measurements] == list(METHODS)
    for measurement in measurements:
        assert len(measurement.samples_ms) == timing.MIN_ROUNDS
        assert 0 < measurement.p20_ms <= measurement.median_ms <= measurement.p80_ms
        assert measurement.sdpa_ratio == pytest.approx(measurements[0].median_ms / measurement.median_ms)
        assert measurement.error <= budget.forward
        assert measurement.judged_rows == (33 if N == 33 else 64)
        if direction == "training":
            assert measurement.gradient_error <= budget.gradient
        else:
            assert measurement.gradient_error is None
    assert measurements[0].backend_used == "sdpa"
    assert measurements[3].backend_used == ("reference" if NATIVE_ABSENT else "native")


@pytest.mark.parametrize("N", [33, 1100])
def test_a_wrong_output_shows_in_the_error(N: int, monkeypatch) -> None:
    def off(q, k, v, is_causal):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal) * 1.001

    monkeypatch.setitem(implementations.PEERS, "off", implementations.Peer("softmax", lambda: off))
    wrong = Method("off", "softmax", "direct", "off")
    forward, training = (
        measure(Problem(N, 8, 8, direction=direction), [SDPA, wrong], device=CPU, budget_s=0.0)
        for direction in ("forward", "training")
    )
    assert forward[0].error < 1e-6
    assert forward[1].error == pytest.approx(1e-3, rel=0.01)
    assert training[1].gradient_error == pytest.approx(1e-3, rel=0.01)


def test_sampled_queries_agree_with_all() -> None:
    problem = Problem(1500, 4, 4, H=1, is_causal=True, direction="training")
    tensors = problem.inputs(CPU)
    upstream = torch.randn(1, 1, 1500, 4)
    sampled = truth_of(QUADRATIC_CHUNKED, problem, tensors, upstream)
    assert sampled.queries[0] == 0
    assert sampled.queries[-1] == 1499
    q, k, v = (t.double().requires_grad_() for t in tensors)
    weights = ((1 + q @ k.mT) ** 2).tril()
    out = weights @ v / weights.sum(-1, keepdim=True)
    (dq,) = torch.autograd.grad(out, q, upstream.double())
    torch.testing.assert_close(sampled.tensors[0], out[:, :, sampled.queries].detach())
    torch.testing.assert_close(sampled.tensors[1], dq[:, :, sampled.queries])


def test_judged_queries_are_all_or_sixty_four() -> None:
    assert judged_queries(1024).tolist() == list(range(1024))
    assert len(judged_queries(1025).unique()) == 64


def test_repeats_are_interleaved_and_reversed() -> None:
    order: list[str] = []
    samples, last = timing.side_by_side(
        {name: lambda name=name: order.append(name) or len(order) for name in "abc"}, device=CPU, budget_s=0.0
    )
    assert {name: len(ms) for name, ms in samples.items()} == dict.fromkeys("abc", timing.MIN_ROUNDS)
    changes = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    # Warm-up of each, then a b c, c b a, a b c; neighbours of one name run together.
    assert changes == list("abcabcbabc")
    assert last["c"] == len(order)


def test_budget_buys_rounds(monkeypatch) -> None:
    clock = [0.0]

    def call() -> None:
        clock[0] += 0.01

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    samples, _ = timing.side_by_side({"a": call, "b": call}, device=CPU, budget_s=0.41)
    assert len(samples["a"]) == 20
    assert samples["a"] == pytest.approx([10.0] * 20)
    endless, _ = timing.side_by_side({"a": call}, device=CPU, budget_s=1e9)
    assert len(endless["a"]) == timing.MAX_ROUNDS


def test_summary_is_median_and_band() -> None:
    summary = timing.summarise([float(i) for i in range(11)])
    assert (summary.median, summary.p20, summary.p80) == (5.0, 2.0, 8.0)
    assert timing.summarise([4.0]) == timing.Summary(4.0, 4.0, 4.0)


def test_slow_methods_are_skipped_with_a_reason() -> None:
    seen = [
        Measurement(SDPA, Problem(512, 8, 8), median_ms=100.0, samples_ms=[100.0]),
        Measurement(QUADRATIC_CHUNKED, Problem(512, 8, 8), median_ms=100.0, samples_ms=[100.0]),
    ]
    kept, skipped = select_affordable([SDPA, QUADRATIC_CHUNKED, SOFTMAX], Problem(2048, 8, 8), seen, limit_s=1.0)
    assert kept == [QUADRATIC_CHUNKED, SOFTMAX]
    assert [(measurement.method, measurement.skipped) for measurement in skipped] == [(SDPA, "about 2 s a call")]
    kept, skipped = select_affordable([SDPA], Problem(4096, 8, 8), seen + skipped, limit_s=100.0)
    assert kept == []
    assert "shorter sequence" in skipped[0].skipped
    assert select_affordable([SDPA], Problem(2048, 8, 8, is_causal=True), seen, limit_s=1.0)[0] == [SDPA]


def test_useful_work() -> None:
    assert useful_gflops(SDPA, Problem(1000, 10, 10, H=1)) == pytest.approx(4 * 1000 * 1000 * 10 / 1e9)
    assert useful_gflops(QUADRATIC_CHUNKED, Problem(1000, 10, 10, H=1)) == pytest.approx(1000 * 4 * 66 * 11 / 1e9)
    assert useful_gflops(QUADRATIC_CHUNKED, Problem(10, 10, 10, H=1)) == pytest.approx(4 * 10 * 10 * 10 / 1e9)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set can be reset on Linux only")
def test_memory_is_that_of_the_call_alone() -> None:
    with MemoryProbe(CPU) as memory:
        small, large, again = (memory.peak_mib(SDPA, Problem(1024, 64, 64, H=H)) for H in (16, 64, 16))
        training = memory.peak_mib(SDPA, Problem(1024, 64, 64, H=16, direction="training"))
    # The output alone takes 4 and 16 MiB; SDPA adds its row sums and a tile a thread.
    assert 4 <= small <= 10
    assert 16 <= large <= 24
    assert again == pytest.approx(small, abs=2)
    assert training >= 4 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set can be reset on Linux only")
def test_memory_does_not_depend_on_what_was_measured_before() -> None:
    """The direct form keeps its scratch memory for the next call."""
    problem = Problem(8192, 64, 64, H=2, is_causal=True)
    with MemoryProbe(CPU) as memory:
        first, again = memory.peak_mib(QUADRATIC_DIRECT, problem), memory.peak_mib(QUADRATIC_DIRECT, problem)
    assert again == pytest.approx(first, abs=1)
    assert first >= 4


def test_memory_probe_survives_a_call_that_fails(monkeypatch) -> None:
    with MemoryProbe(CPU) as memory:
        # 256 TiB: no machine has it.
        assert memory.peak_mib(SDPA, Problem(2**40, 64, 64)) is None
        assert memory.peak_mib(SDPA, Problem(64, 8, 8)) is not None


def test_unknown_parts_of_a_case_are_refused() -> None:
    with pytest.raises(ArgumentError, match="'fp32'"):
        Problem(8, 8, 8, dtype="fp31")
    with pytest.raises(ArgumentError, match="N=0"):
        Problem(0, 8, 8)
    with pytest.raises(ArgumentError, match="'elu\\+1'"):
        cases.attention_of(Method("x", "elu", "chunked"))
    with pytest.raises(ArgumentError, match="computes 'softmax'"):
        cases.attention_of(Method("x", "quadratic", "direct", "sdpa"))


def test_no_methods_no_rows() -> None:
    assert measuring.measure(Problem(8, 8, 8), [], device=CPU, budget_s=0.0) == []
