"""Measure one comparison: an entry for each method, with time, work, share of the machine's limit, memory and error."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import linattn
from linattn.bench.gpu.cases import OURS, Comparison, Goal, value_of
from linattn.bench.measuring.accuracy import truth_of
from linattn.bench.measuring.cases import DTYPES, Method, Problem, prepare
from linattn.bench.measuring.ceilings import Extent, calls_to_time, reached
from linattn.bench.measuring.measure import least_bytes, useful_gflops
from linattn.bench.measuring.timing import in_rounds, summarise
from linattn.cost import flops
from linattn.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Entry = dict[str, object]
CHUNK = 1024
"""Chunk length for which the limit of a causal chunked form is stated."""
HONEST_ERROR = 3e-2
"""A peer with a larger error computes something else than what it stands for; goals do not count it."""
SCORE_STD = 0.25


@dataclass(frozen=True)
class MachineLimits:
    """Rates that the machine reached in this very run."""

    copy_gb_s: float
    matmul_tflops: float


def measure_limits(device: torch.device, rehearse: bool) -> MachineLimits:
    """Measure the rate of a large device-to-device copy, bytes read and written, and of a bf16 matrix product."""
    extent = Extent(2**20, 256) if rehearse else Extent(2**32, 8192)
    samples, _ = in_rounds(calls_to_time(extent, ("bf16",), device), device=device, rep_ms=100)
    found = reached(extent, samples)
    return MachineLimits(found.copy_gb_s, found.matmul_gflops["bf16"] / 1e3)


def draw(problem: Problem, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Draw q, k, v as `testing.make_inputs` scales them, but on the device, and in training an upstream gradient."""
    generator = torch.Generator(device).manual_seed(0)
    factor = SCORE_STD**0.5 / problem.D**0.25

    def normal(size: int) -> Tensor:
        shape = (problem.B, problem.H, problem.N, size)
        return torch.randn(shape, dtype=torch.float32, device=device, generator=generator)

    dtype = DTYPES[problem.dtype]
    q, k, v = (
        (normal(problem.D) * factor).to(dtype),
        (normal(problem.D) * factor).to(dtype),
        normal(problem.M).to(dtype),
    )
    return (q, k, v), normal(problem.M).to(dtype) if problem.direction == "training" else None


def compare(
    comparison: Comparison, device: torch.device, limits: MachineLimits, *, rep_ms: float = 60.0
) -> dict[str, Entry]:
    """Measure every method that runs; the others say why not in `skipped` (refused) or `failed` (anything else)."""
    problem = comparison.problem
    tensors, upstream = draw(problem, device)
    entries: dict[str, Entry] = {}
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for method in comparison.methods:
        entries[method.name] = {"method": asdict(method), "problem": asdict(problem)}
        try:
            call = prepare(method, problem, tensors, upstream)
            entries[method.name]["peak_mib"] = _peak_mib(call, device)
            calls[method.name] = call
        except BackendError as refusal:
            entries[method.name]["skipped"] = str(refusal)
        except Exception as error:  # a peer that is absent or breaks must not take the others down
            entries[method.name]["failed"] = f"{type(error).__name__}: {_first_line(error)}"
            gc.collect()
    samples, results = in_rounds(calls, device=device, rep_ms=rep_ms)
    truths = {}
    for method in comparison.methods:
        if method.name not in calls:
            continue
        entry = entries[method.name]
        summary = summarise(samples[method.name])
        entry.update(ms=summary.median, p20_ms=summary.p20, p80_ms=summary.p80, repeats=len(samples[method.name]))
        entry.update(rates(method, problem, summary.median, limits))
        entry["runs"] = _describe_kernels(method, problem, tensors)
        if method.op not in truths:
            truths[method.op] = truth_of(method, problem, tensors, upstream)
        entry["error"] = truths[method.op].error(results[method.name])
        entry["gradient_error"] = truths[method.op].gradient_error(results[method.name])
        entry["judged_rows"] = len(truths[method.op].queries)
    return entries


def rates(method: Method, problem: Problem, ms: float, limits: MachineLimits) -> Entry:
    """Return useful work and necessary traffic in a second, and the share of the time that the limits allow."""
    moved = least_bytes(problem)
    bandwidth_ms = moved / limits.copy_gb_s / 1e6
    matmul_ms = _limiting_gflops(method, problem) / limits.matmul_tflops
    gflops = useful_gflops(method, problem)
    return {
        "TFLOP/s": gflops / ms,
        "GB/s": moved / ms / 1e6,
        "limit_ms": max(bandwidth_ms, matmul_ms),
        "bound": "bandwidth" if bandwidth_ms > matmul_ms else "matrix products",
        "share of limit": max(bandwidth_ms, matmul_ms) / ms,
        "share of bandwidth": bandwidth_ms / ms,
    }


def _limiting_gflops(method: Method, problem: Problem) -> float:
    """Return the work of the form itself: for a causal chunked quadratic form with the inside of its chunks."""
    if method.kernel != "quadratic" or method.form != "chunked":
        return useful_gflops(method, problem)
    sizes = {"B": problem.B, "H": problem.H, "N": problem.N, "D": problem.D, "M": problem.M}
    passes = (False, True) if problem.direction == "training" else (False,)
    return sum(
        flops("quadratic", "chunked", is_causal=problem.is_causal, chunk=CHUNK, backward=p, **sizes) / 1e9
        for p in passes
    )


def judge_goals(comparison: Comparison, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Put each goal of a comparison beside what was measured."""
    honest = [
        name for name, entry in entries.items() if isinstance(e := entry.get("error"), float) and e <= HONEST_ERROR
    ]
    return {f"{comparison.problem}/{goal}": verdict(goal, value_of(goal, entries, honest)) for goal in comparison.goals}


def verdict(goal: Goal, value: object) -> Entry:
    """Put a goal beside what was measured of it."""
    return {
        "quantity": goal.quantity,
        "method": goal.method.name,
        "rivals": [m.name for m in goal.rivals],
        "goal": goal.goal,
        "stretch": goal.stretch,
        "at_most": goal.at_most,
        "measured": value,
        "met": goal.is_met_by(value) if isinstance(value, float) else None,
    }


def failures_of_ours(entries: Sequence[Entry]) -> list[str]:
    """Collect the messages of methods of our own that failed instead of running or refusing."""
    ours = [entry for entry in entries if isinstance(m := entry.get("method"), dict) and m["backend"] == OURS]
    return [str(entry["failed"]) for entry in ours if "failed" in entry]


def _peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Measure the peak memory of a first call beyond what is held before it; the call also compiles what has to be
    compiled.
    """
    if device.type != "cuda":
        call()
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _describe_kernels(method: Method, problem: Problem, tensors: Sequence[Tensor]) -> str:
    """Return the kernels that ran and their configuration, for methods of ours."""
    if method.backend != OURS or method.op in ("power", "plain"):
        return method.backend
    q, k, v = tensors
    options = {} if method.op == "softmax" else {"form": method.form}
    found = linattn.explain(q, k, v, kernel=method.op, is_causal=problem.is_causal, backend=method.backend, **options)
    return found.runs


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else ""
