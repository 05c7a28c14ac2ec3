"""One problem, every method: time side by side, then the error of what was timed, then memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from linattn.bench.measuring.accuracy import Truth, truth_of
from linattn.bench.measuring.cases import DTYPES, SDPA, Method, Problem, backend_used, prepare
from linattn.bench.measuring.results import Measurement
from linattn.bench.measuring.timing import side_by_side, summarise
from linattn.cost import Form, flops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linattn.bench.measuring.memory import MemoryProbe


def measure(
    problem: Problem,
    methods: Sequence[Method],
    *,
    device: torch.device,
    budget_s: float,
    memory: MemoryProbe | None = None,
) -> list[Measurement]:
    """Measure every method on the same inputs, in about `budget_s` seconds of timing plus one call each for memory.

    Returns:
        one row a method, in the order given.
    """
    if not methods:
        return []
    tensors = problem.inputs(device)
    upstream = None
    if problem.direction == "training":
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(problem.B, problem.H, problem.N, problem.M, generator=generator)
        upstream = drawn.to(device=device, dtype=DTYPES[problem.dtype])
    calls = {method.name: prepare(method, problem, tensors, upstream) for method in methods}
    samples, outputs = side_by_side(calls, device=device, budget_s=budget_s)

    sdpa_ms = summarise(samples[SDPA.name]).median if SDPA.name in samples else None
    truths: dict[str, Truth] = {}
    measurements = []
    for method in methods:
        if method.op not in truths:
            truths[method.op] = truth_of(method, problem, tensors, upstream)
        truth, summary = truths[method.op], summarise(samples[method.name])
        measurements.append(
            Measurement(
                method,
                problem,
                backend_used=backend_used(method, problem, tensors),
                samples_ms=samples[method.name],
                median_ms=summary.median,
                p20_ms=summary.p20,
                p80_ms=summary.p80,
                sdpa_ratio=None if sdpa_ms is None else sdpa_ms / summary.median,
                gflops=useful_gflops(method, problem),
                error=truth.error(outputs[method.name]),
                gradient_error=truth.gradient_error(outputs[method.name]),
                judged_rows=len(truth.queries),
                peak_mib=None if memory is None else memory.peak_mib(method, problem),
            )
        )
    return measurements


def select_affordable(
    methods: Sequence[Method], problem: Problem, measurements: Sequence[Measurement], limit_s: float
) -> tuple[list[Method], list[Measurement]]:
    """Keep the methods expected to take at most `limit_s` seconds a call, and say why the others were skipped.

    Expected is the time on the longest shorter sequence among `measurements`, growing with N^2 for direct forms, else
    with N.
    """
    kept, skipped = [], []
    for method in methods:
        shorter = [
            measurement
            for measurement in measurements
            if measurement.method == method
            and measurement.problem.N < problem.N
            and replace(measurement.problem, N=problem.N) == problem
        ]
        last = max(shorter, key=lambda measurement: measurement.problem.N, default=None)
        if last is None:
            kept.append(method)
            continue
        # A method that was too slow for a shorter sequence is too slow for this one.
        growth = (problem.N / last.problem.N) ** (2 if method.form == "direct" else 1)
        seconds = math.inf if last.median_ms is None else last.median_ms / 1e3 * growth
        if seconds <= limit_s:
            kept.append(method)
        else:
            about = "too slow for a shorter sequence" if math.isinf(seconds) else f"about {seconds:.0f} s a call"
            skipped.append(Measurement(method, problem, skipped=about))
    return kept, skipped


def useful_gflops(method: Method, problem: Problem) -> float:
    """Count the work that cannot be avoided, in 1e9 flops by the formulas of `linattn.cost`.

    The direct form's own flops; for the others those of the state, without the inside of chunks, and never more than
    the direct form would take.
    """
    forms: tuple[Form, ...] = ("direct",) if method.form == "direct" else ("direct", "chunked")
    sizes = {"B": problem.B, "H": problem.H, "N": problem.N, "D": problem.D, "M": problem.M, "chunk": 0}
    passes = (False, True) if problem.direction == "training" else (False,)
    return min(
        sum(flops(method.kernel, form, is_causal=problem.is_causal, backward=p, **sizes) for p in passes) / 1e9
        for form in forms
    )


def least_bytes(problem: Problem) -> int:
    """Count the bytes that must cross to and from memory: q, k, v are read and out is written once.

    Backward q, k, v, out and its gradient are read again, and dq, dk, dv written.
    """
    itemsize = DTYPES[problem.dtype].itemsize
    q, v = (problem.B * problem.H * problem.N * size * itemsize for size in (problem.D, problem.M))
    return 2 * (q + v) + (4 * (q + v) if problem.direction == "training" else 0)
