"""Do the work of each stage of `make gpu`, which command.py declares; write every finding as soon as it is made.

A stage returns 0, or 1 if something of ours failed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import linattn
from linattn.bench.gpu import cases
from linattn.bench.gpu.measurements import (
    MachineLimits,
    compare,
    failures_of_ours,
    judge_goals,
    measure_limits,
    verdict,
)
from linattn.bench.gpu.stages import Record
from linattn.bench.measuring.cases import SDPA, Method, attention_of
from linattn.bench.measuring.crossing import find_crossing
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.timing import in_rounds, summarise
from linattn.errors import BackendError
from linattn.states import FeatureMapState, QuadraticState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS_APART = 100_000


@dataclass(frozen=True)
class StageRun:
    """The device of a stage and the folder that it writes to."""

    device: torch.device
    out: Path
    rehearse: bool
    missing: bool

    @property
    def record(self) -> Record:
        """The file of all findings."""
        return Record(self.out / "gpu.json")

    @property
    def limits(self) -> MachineLimits:
        """Return what the stage of that name found; measure it now where that did not run."""
        found = self.record.section("limits").get(self.device.type)
        return MachineLimits(**found) if found else measure_limits(self.device, self.rehearse)


def environment(run: StageRun) -> int:
    """Write down the machine and the code."""
    found = describe(run.device)
    run.record.put("environment", run.device.type, asdict(found))
    print(f"{found.device}, driver {found.driver}, torch {found.torch}, triton {found.triton}, commit {found.commit}")
    return 0


def correctness(run: StageRun) -> int:
    """Run the tests of the Triton kernels: on all processors if pytest-xdist is there, for most of the time goes into
    compiling. In a rehearsal all are collected and a few are run.
    """
    import pytest

    # Other people's plugins and newer versions' warnings are no reason for a test to fail here.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    words = ["-q", "--no-header", "-W", "default", "-p", "no:cacheprovider", "-m", "not install and not torchrun"]
    if importlib.util.find_spec("xdist") and not run.rehearse:
        words += ["-p", "xdist.plugin", "-n", str(_processes(run)), "--dist", "worksteal"]
    if run.rehearse:
        words += ["-k", "repeat"]
    kernels = ROOT / "tests" / "kernels"
    first = (
        "quadratic/test_triton_direct",
        "quadratic/test_triton_chunked",
        "feature_map/test_triton",
        "softmax/test_triton",
    )
    files = [kernels / f"{name}.py" for name in first]
    files += sorted({*kernels.rglob("test_triton*.py"), *kernels.glob("test_*triton*.py")} - set(files))
    files.append(kernels / "test_cuda.py")
    outcomes = Outcomes(run.record)
    status = pytest.main([*words, *map(str, files)], plugins=[outcomes])
    outcomes.write()
    return 0 if status == pytest.ExitCode.OK else 1


class Outcomes:
    """A plugin of pytest that records, every other second, how many tests have passed and which have not."""

    def __init__(self, record: Record) -> None:
        self.record, self.counts, self.failures = record, Counter[str](), list[str]()
        self.begun = self.written = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the outcome of a test and keep the last line of a failure."""
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            self.failures.append(f"{report.nodeid}: {lines[-1] if lines else 'no output'}")
        if time.monotonic() - self.written > 2:
            self.write()

    def write(self) -> None:
        """Put the counts into the record."""
        self.written = time.monotonic()
        found = {**self.counts, "failures": self.failures, "seconds": round(self.written - self.begun, 1)}
        self.record.put("tests", "kernels", found)


def _processes(run: StageRun) -> int:
    """Choose as many processes as there are processors, less one, for what compiles more than it computes; in a
    rehearsal one.
    """
    return 1 if run.rehearse else max(1, min(16, (os.cpu_count() or 2) - 1))


def fuzz(run: StageRun) -> int:
    """Run `linattn fuzz` for a minute, in as many processes as compile side by side, from seeds far apart."""
    seconds, extent = ("10", "tiny") if run.rehearse else ("60", "medium")
    words = ["--backend", "triton", "--seconds", seconds, "--extent", extent, "--device", run.device.type]

    def search(start: int) -> bool:
        command = [sys.executable, "-m", "linattn", "fuzz", "--start", str(start), *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        found = {"passed": done.returncode == 0, "report": done.stdout.splitlines()}
        run.record.put("fuzz", f"{run.device.type} from seed {start}", found)
        print(f"from seed {start}: {done.stdout}", flush=True)
        return done.returncode == 0

    count = _processes(run)
    with ThreadPoolExecutor(count) as pool:
        return 0 if all(list(pool.map(search, range(0, count * SEEDS_APART, SEEDS_APART)))) else 1


def limits(run: StageRun) -> int:
    """Measure what the machine can do."""
    found = measure_limits(run.device, run.rehearse)
    run.record.put("limits", run.device.type, asdict(found))
    print(f"copy {found.copy_gb_s:.0f} GB/s, bf16 matrix products {found.matmul_tflops:.1f} TFLOP/s")
    return 0


def _comparisons(stage: str, table: Iterable[cases.Comparison]) -> Callable[[StageRun], int]:
    def measure(run: StageRun) -> int:
        limits, failures = run.limits, []
        for comparison in cases.distinct(map(cases.small, table)) if run.rehearse else table:
            prefix = f"{stage}/{comparison.problem}"
            if run.missing and f"{prefix}/{comparison.methods[-1].name}" in run.record.section("rows"):
                continue
            entries = compare(comparison, run.device, limits)
            for name, entry in entries.items():
                run.record.put("rows", f"{prefix}/{name}", entry)
                print(f"{comparison.problem}  {name}: {_one_line(entry)}", flush=True)
            for key, judged in judge_goals(comparison, entries).items():
                run.record.put("goals", f"{stage}/{key}", judged)
            failures += failures_of_ours(list(entries.values()))
        return 1 if failures else 0

    return measure


def crossover(run: StageRun) -> int:
    """Measure N* of the chunked form against the fastest softmax at each length."""
    limits, failures = run.limits, []
    for sweep in cases.distinct(map(cases.small_sweep, cases.SWEEPS)) if run.rehearse else cases.SWEEPS:
        ms: dict[str, dict[int, float]] = {}
        for problem in sweep.problems():
            entries = compare(cases.Comparison(problem, cases.SWEPT), run.device, limits, rep_ms=30)
            failures += failures_of_ours(list(entries.values()))
            for name, entry in entries.items():
                run.record.put("rows", f"crossover/{problem}/{name}", entry)
                if isinstance(entry.get("ms"), float):
                    ms.setdefault(name, {})[problem.N] = float(str(entry["ms"]))
        _put_crossing(run.record, sweep, ms)
    return 1 if failures else 0


def _put_crossing(record: Record, sweep: cases.LengthSweep, ms: dict[str, dict[int, float]]) -> None:
    """Record, from times by method and length, N* against the fastest softmax, and what it is in D^2."""
    chunked, rivals = ms.get(cases.CHUNKED.name, {}), [ms.get(m.name, {}) for m in cases.FASTEST_SOFTMAX]
    softmax = {N: min(times[N] for times in rivals if N in times) for N in sweep.sizes if any(N in t for t in rivals)}
    found = find_crossing({N: [t] for N, t in chunked.items()}, {N: [t] for N, t in softmax.items()})
    if found is None:
        print(f"{sweep}: not both on two lengths", flush=True)
        return
    value = found.value and found.value / sweep.problem.D**2
    measured = {"text": str(found), "bracketed": found.bracketed, "N*/D^2": value}
    times = {"chunked": chunked, "softmax": softmax, "direct": ms.get(cases.DIRECT.name, {})}
    record.put("crossover", str(sweep), {**measured, "ms": times})
    record.put("goals", f"crossover/{sweep}: {sweep.target}", verdict(sweep.target, value))
    print(f"{sweep}: {found} against the fastest softmax", flush=True)


def decode(run: StageRun) -> int:
    """Measure one step of decoding, which reads the state and writes it."""
    bandwidth = run.limits.copy_gb_s
    for step in cases.distinct(map(cases.small_step, cases.STEPS)) if run.rehearse else cases.STEPS:
        try:
            samples, _ = in_rounds({"step": decoding_step(step, run.device)}, device=run.device, rep_ms=60)
        except BackendError as refusal:
            run.record.put("rows", f"decode/{step}", {"skipped": str(refusal)})
            continue
        ms = summarise(samples["step"]).median
        rate = 2 * step.state_bytes / ms / 1e6
        entry: dict[str, object] = {"ms": ms, "GB/s": rate, "share of bandwidth": rate / bandwidth}
        run.record.put("rows", f"decode/{step}", entry)
        run.record.put("goals", f"decode/{step}: {step.goal}", verdict(step.goal, rate / bandwidth))
        print(f"decode {step}: {_one_line(entry)}", flush=True)
    return 0


def decoding_step(step: cases.DecodeStep, device: torch.device) -> Callable[[], object]:
    """Return a call with one token and a state of random sums."""
    shape = (step.B, step.H, 1, step.D)
    q, k, v = (torch.randn(shape, device=device).mul(0.2).bfloat16() for _ in range(3))
    kind = QuadraticState if step.op == "quadratic" else FeatureMapState
    n, *sums = kind.empty(step.B, step.H, step.D, step.D, device=device)
    state: Any = kind(n + 100, *(torch.rand_like(x) for x in sums))
    options: dict[str, Any] = {"is_causal": True, "backend": cases.OURS, "form": "recurrent"}
    if step.op == "quadratic":
        return lambda: linattn.quadratic_attention(q, k, v, initial_state=state, return_state=True, **options)
    return lambda: linattn.linear_attention(
        q, k, v, feature_map=step.op, initial_state=state, return_state=True, **options
    )


def host(run: StageRun) -> int:
    """Time until a call returns, of calls so small that the device is never waited for. In a rehearsal launches are
    recorded and not executed: what remains is the time until they would be handed to Triton.
    """
    q, k, v = (torch.randn(1, 1, 16, 16, device=run.device).mul(0.3).bfloat16().requires_grad_() for _ in range(3))
    upstream = torch.randn_like(q)

    def measured(method: Method) -> dict[str, object]:
        attend = attention_of(method)

        def training() -> None:
            torch.autograd.grad(attend(q, k, v, True), (q, k, v), upstream)

        @torch.no_grad()
        def forward() -> None:
            attend(q, k, v, True)

        try:
            return {f"{call.__name__}_us": _host_us(call, run) for call in (forward, training)}
        except BackendError as refusal:
            return {"skipped": str(refusal)}

    for method in (cases.DIRECT, cases.CHUNKED, cases.SOFTMAX, cases.ELU, SDPA):
        entry = measured(method)
        run.record.put("host", method.name, entry)
        print(f"{method.name}: {entry}", flush=True)
    return 0


def _host_us(call: Callable[[], None], run: StageRun, count: int = 200) -> float:
    """Measure the median of the microseconds until each of some calls has returned."""
    from linattn.kernels.common.gpu.launch import recording

    samples = []
    with recording() if run.rehearse else nullcontext():
        for _ in range(count):
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            samples.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(samples)


def million(run: StageRun) -> int:
    """Measure a million tokens; softmax is measured at an eighth of that and extrapolated by N^2, which the record
    says.
    """
    comparison, softmax = (cases.small(c) if run.rehearse else c for c in (cases.MILLION, cases.MILLION_SOFTMAX))
    entries = compare(comparison, run.device, run.limits, rep_ms=200)
    ours = entries[cases.CHUNKED.name]
    if isinstance(peak := ours.get("peak_mib"), float):
        ours["GiB"] = peak / 1024
    rivals = compare(softmax, run.device, run.limits, rep_ms=100)
    for at, found in ((comparison.problem, entries), (softmax.problem, rivals)):
        for name, entry in found.items():
            run.record.put("rows", f"million/{at}/{name}", entry)
            print(f"{at}  {name}: {_one_line(entry)}", flush=True)
    factor = (comparison.problem.N / softmax.problem.N) ** 2
    times = [float(str(entry["ms"])) * factor for entry in rivals.values() if "ms" in entry]
    speedup = min(times) / float(str(ours["ms"])) if times and "ms" in ours else None
    memory, speed = comparison.goals
    run.record.put("goals", f"million/{memory}", verdict(memory, ours.get("GiB")))
    extrapolated = f"softmax, extrapolated from N = {softmax.problem.N} by N^2"
    run.record.put("goals", f"million/{speed} over {extrapolated}", verdict(speed, speedup))
    return 1 if failures_of_ours([ours]) else 0


def sanitizer(run: StageRun) -> int:
    """Look for memory errors and races that random calls may hide."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or run.rehearse:
        run.record.put(
            "sanitizer", "memcheck", {"skipped": "compute-sanitizer is not installed" if tool is None else "rehearsal"}
        )
        print("skipped")
        return 0
    # A caching allocator would hide an access beyond one tensor that falls into another.
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = [sys.executable, "-m", "linattn", "fuzz", "--backend", "triton", "--extent", "tiny", "--device", "cuda"]
    status = 0
    for check, seconds in (("memcheck", "15"), ("racecheck", "8")):
        command = [tool, "--tool", check, "--error-exitcode", "9", *words, "--seconds", seconds]
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
        tail = done.stdout.strip().splitlines()[-20:]
        run.record.put("sanitizer", check, {"passed": done.returncode == 0, "report": tail})
        print(f"{check}: {'clean' if done.returncode == 0 else 'FAILED'}", *tail[-3:], sep="\n  ", flush=True)
        status |= done.returncode != 0
    return status


def figures(run: StageRun) -> int:
    """Draw what the file holds."""
    try:
        from linattn.bench.gpu.plots import draw_all

        print("written: " + ", ".join(str(path) for path in draw_all(run.record, run.out)))
    except ImportError as absent:
        print(f"no figures: {absent}")
    return 0


RUNS: dict[str, Callable[[StageRun], int]] = {
    "environment": environment,
    "correctness": correctness,
    "fuzz": fuzz,
    "limits": limits,
    "direct": _comparisons("direct", cases.DIRECT_CASES),
    "chunked": _comparisons("chunked", cases.CHUNKED_CASES),
    "feature_map": _comparisons("feature_map", cases.FEATURE_MAP_CASES),
    "crossover": crossover,
    "decode": decode,
    "host": host,
    "million": million,
    "flex": _comparisons("flex", cases.FLEX_CASES),
    "peers": _comparisons("peers", cases.PEER_CASES),
    "fla": _comparisons("fla", cases.FLA_CASES),
    "sanitizer": sanitizer,
    "figures": figures,
}


def _one_line(entry: dict[str, object]) -> str:
    if "ms" not in entry:
        return str(entry.get("skipped") or entry.get("failed"))
    units = {"ms": ".4g", "TFLOP/s": ".0f", "GB/s": ".0f", "share of limit": ".0%", "peak_mib": ".0f", "error": ".1e"}
    return ", ".join(f"{name} {entry[name]:{style}}" for name, style in units.items() if entry.get(name) is not None)
