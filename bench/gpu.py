"""`make gpu`: everything that has to be measured on a GPU, in one command and under 9 minutes.

    python bench/gpu.py                          all stages, most important first
    python bench/gpu.py --only direct,chunked    some of them; what the others found before stays in the file
    python bench/gpu.py --missing                only what the file lacks
    python bench/gpu.py --rehearse               the same on the CPU, in Triton's interpreter, at tiny sizes

It needs torch, Triton and, for one stage, pytest; no network. Every finding is in OUT/gpu.json as soon as it is made.
Each stage is a process of its own with a time limit; the exit status is 1 if one of them failed, was cut off or not
reached. A goal that is missed fails nothing: it stays in the table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import linattn
from linattn.bench import gpu_cases as cases
from linattn.bench.cases import SDPA, Method, attention_of
from linattn.bench.crossing import find_crossing
from linattn.bench.environment import describe
from linattn.bench.gpu_rows import Limits, broken, compare, judge_goals, measure_limits, verdict
from linattn.bench.stages import DONE, Record, Stage, run_stages
from linattn.bench.timing import in_rounds, summarise
from linattn.environment import device_slug
from linattn.errors import BackendError, LinattnError, unknown_name
from linattn.state import FeatureMapState, QuadraticState

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 530.0
SEEDS_APART = 100_000
PEERS = ROOT / "peers"
STAGES = (
    Stage("environment", "device, clocks, driver, versions, commit", 30),
    Stage("correctness", "the tests of the kernels on this device", 150),
    Stage("fuzz", "random calls against the truth in float64", 90),
    Stage("limits", "copy bandwidth and matrix products", 30),
    Stage("direct", "direct quadratic form and softmax, beside PyTorch's", 75),
    Stage("chunked", "chunked quadratic form at 65536 tokens", 75),
    Stage("feature_map", "feature-map attention on six shapes", 60),
    Stage("crossover", "the length from which the chunked form is faster than any softmax", 90),
    Stage("decode", "one step of decoding", 30),
    Stage("host", "host time of a call", 30),
    Stage("million", "1,048,576 tokens", 45),
    Stage("flex", "beside FlexAttention", 75),
    Stage("peers", "beside retention and fla's rebased, if their wheels are in peers/", 60),
    Stage("fla", "beside fla on its own six shapes, if its wheel is in peers/", 120),
    Stage("sanitizer", "compute-sanitizer on small calls, if it is installed", 60),
    Stage("figures", "figures from the file", 30),
)


@dataclass(frozen=True)
class Run:
    """Where a stage runs and writes."""

    device: torch.device
    out: Path
    rehearse: bool
    missing: bool

    @property
    def record(self) -> Record:
        """The file of all findings."""
        return Record(self.out / "gpu.json")

    @property
    def limits(self) -> Limits:
        """What the stage of that name found, or, where it did not run, measured now."""
        found = self.record.section("limits").get(self.device.type)
        return Limits(**found) if found else measure_limits(self.device, self.rehearse)


# ---- stages ----------------------------------------------------------------------------------------------------------


def environment(run: Run) -> int:
    """Write down the machine and the code."""
    found = describe(run.device)
    run.record.put("environment", run.device.type, asdict(found))
    print(f"{found.device}, driver {found.driver}, torch {found.torch}, triton {found.triton}, commit {found.commit}")
    return 0


def correctness(run: Run) -> int:
    """Each file of tests in a process of its own, several at a time: most of the time goes into compiling."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py")) + [ROOT / "tests" / "test_cuda.py"]
    collect = ["--collect-only"] if run.rehearse else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-rf", *collect]

    def test(file: Path) -> bool:
        begun = time.monotonic()
        done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        # 5: a file without tests for this machine.
        passed = done.returncode in (0, 5)
        found = {"passed": passed, "summary": lines[-1], "failures": failures, "seconds": time.monotonic() - begun}
        run.record.put("tests", file.name, found)
        print(f"{'ok    ' if passed else 'FAILED'} {file.name}: {lines[-1]}", *failures, sep="\n  ", flush=True)
        return passed

    return 0 if all(_side_by_side(run, test, files)) else 1


def _side_by_side(run: Run, work: Callable[[T], bool], items: Iterable[T]) -> list[bool]:
    """`work` on all items: on half of the processors, up to 8 at a time; in a rehearsal one by one."""
    with ThreadPoolExecutor(1 if run.rehearse else max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        return list(pool.map(work, items))


def fuzz(run: Run) -> int:
    """`linattn fuzz` for a minute, several at a time from seeds far apart: nearly every call compiles its kernels."""
    seconds, extent = ("10", "tiny") if run.rehearse else ("60", "medium")
    words = ["--backend", "triton", "--seconds", seconds, "--extent", extent, "--device", run.device.type]

    def search(start: int) -> bool:
        command = [sys.executable, "-m", "linattn", "fuzz", "--start", str(start), *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        found = {"passed": done.returncode == 0, "report": done.stdout.splitlines()}
        run.record.put("fuzz", f"{run.device.type} from seed {start}", found)
        print(f"from seed {start}: {done.stdout}", flush=True)
        return done.returncode == 0

    return 0 if all(_side_by_side(run, search, range(0, 1 if run.rehearse else 8 * SEEDS_APART, SEEDS_APART))) else 1


def limits(run: Run) -> int:
    """Measure what the machine can do."""
    found = measure_limits(run.device, run.rehearse)
    run.record.put("limits", run.device.type, asdict(found))
    print(f"copy {found.copy_gb_s:.0f} GB/s, bf16 matrix products {found.matmul_tflops:.1f} TFLOP/s")
    return 0


def _comparisons(stage: str, table: Iterable[cases.Comparison]) -> Callable[[Run], int]:
    def measure(run: Run) -> int:
        limits, failures = run.limits, []
        for comparison in cases.distinct(map(cases.small, table)) if run.rehearse else table:
            prefix = f"{stage}/{comparison.problem}"
            if run.missing and f"{prefix}/{comparison.methods[-1].name}" in run.record.section("rows"):
                continue
            rows = compare(comparison, run.device, limits)
            for name, row in rows.items():
                run.record.put("rows", f"{prefix}/{name}", row)
                print(f"{comparison.problem}  {name}: {_one_line(row)}", flush=True)
            for key, judged in judge_goals(comparison, rows).items():
                run.record.put("goals", f"{stage}/{key}", judged)
            failures += broken(list(rows.values()))
        return 1 if failures else 0

    return measure


def crossover(run: Run) -> int:
    """N* of the chunked form against the fastest softmax at each length."""
    limits, failures = run.limits, []
    for sweep in cases.distinct(map(cases.small_sweep, cases.SWEEPS)) if run.rehearse else cases.SWEEPS:
        ms: dict[str, dict[int, float]] = {}
        for problem in sweep.problems():
            rows = compare(cases.Comparison(problem, cases.SWEPT), run.device, limits, rep_ms=30)
            failures += broken(list(rows.values()))
            for name, row in rows.items():
                run.record.put("rows", f"crossover/{problem}/{name}", row)
                if isinstance(row.get("ms"), float):
                    ms.setdefault(name, {})[problem.N] = float(str(row["ms"]))
        _put_crossing(run.record, sweep, ms)
    return 1 if failures else 0


def _put_crossing(record: Record, sweep: cases.Sweep, ms: dict[str, dict[int, float]]) -> None:
    """From times by method and length: N* against the fastest softmax, and what it is in D^2."""
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


def decode(run: Run) -> int:
    """One step of decoding: what it takes is to read the state and to write it."""
    bandwidth = run.limits.copy_gb_s
    for step in cases.distinct(map(cases.small_step, cases.STEPS)) if run.rehearse else cases.STEPS:
        try:
            samples, _ = in_rounds({"step": decoding_step(step, run.device)}, device=run.device, rep_ms=60)
        except BackendError as refusal:
            run.record.put("rows", f"decode/{step}", {"skipped": str(refusal)})
            continue
        ms = summarise(samples["step"]).median
        rate = 2 * step.state_bytes / ms / 1e6
        row: dict[str, object] = {"ms": ms, "GB/s": rate, "share of bandwidth": rate / bandwidth}
        run.record.put("rows", f"decode/{step}", row)
        run.record.put("goals", f"decode/{step}: {step.goal}", verdict(step.goal, rate / bandwidth))
        print(f"decode {step}: {_one_line(row)}", flush=True)
    return 0


def decoding_step(step: cases.Step, device: torch.device) -> Callable[[], object]:
    """A call with one token and a state of random sums."""
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


def host(run: Run) -> int:
    """Time until a call returns, of calls so small that the device is never waited for."""
    calls = 2 if run.rehearse else 200
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
            return {f"{call.__name__}_us": _host_us(call, calls, run.device) for call in (forward, training)}
        except BackendError as refusal:
            return {"skipped": str(refusal)}

    for method in (cases.DIRECT, cases.CHUNKED, cases.SOFTMAX, cases.ELU, SDPA):
        row = measured(method)
        run.record.put("host", method.name, row)
        print(f"{method.name}: {row}", flush=True)
    return 0


def _host_us(call: Callable[[], None], count: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    wait()
    begun = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - begun
    wait()
    return spent / count * 1e6


def million(run: Run) -> int:
    """A million tokens; softmax is measured at an eighth of that and extrapolated by N^2, which the record says."""
    comparison, softmax = (cases.small(c) if run.rehearse else c for c in (cases.MILLION, cases.MILLION_SOFTMAX))
    rows = compare(comparison, run.device, run.limits, rep_ms=200)
    ours = rows[cases.CHUNKED.name]
    if isinstance(peak := ours.get("peak_mib"), float):
        ours["GiB"] = peak / 1024
    rivals = compare(softmax, run.device, run.limits, rep_ms=100)
    for at, found in ((comparison.problem, rows), (softmax.problem, rivals)):
        for name, row in found.items():
            run.record.put("rows", f"million/{at}/{name}", row)
            print(f"{at}  {name}: {_one_line(row)}", flush=True)
    factor = (comparison.problem.N / softmax.problem.N) ** 2
    times = [float(str(row["ms"])) * factor for row in rivals.values() if "ms" in row]
    speedup = min(times) / float(str(ours["ms"])) if times and "ms" in ours else None
    memory, speed = comparison.goals
    run.record.put("goals", f"million/{memory}", verdict(memory, ours.get("GiB")))
    extrapolated = f"softmax, extrapolated from N = {softmax.problem.N} by N^2"
    run.record.put("goals", f"million/{speed} over {extrapolated}", verdict(speed, speedup))
    return 1 if broken([ours]) else 0


def sanitizer(run: Run) -> int:
    """Memory errors and races that random calls may hide."""
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


def figures(run: Run) -> int:
    """Draw what the file holds."""
    try:
        from linattn.bench.gpu_plots import draw_all

        print("written: " + ", ".join(str(path) for path in draw_all(run.record, run.out)))
    except ImportError as absent:
        print(f"no figures: {absent}")
    return 0


RUNS: dict[str, Callable[[Run], int]] = {
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


def _one_line(row: dict[str, object]) -> str:
    if "ms" not in row:
        return str(row.get("skipped") or row.get("failed"))
    units = {"ms": ".4g", "TFLOP/s": ".0f", "GB/s": ".0f", "share of limit": ".0%", "peak_mib": ".0f", "error": ".1e"}
    return ", ".join(f"{name} {row[name]:{style}}" for name, style in units.items() if row.get(name) is not None)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the stages, or, for `--stage`, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=_names, default=[s.name for s in STAGES], metavar="A,B", help="these stages")
    parser.add_argument("--missing", action="store_true", help="leave out what the file already holds")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path, help="folder (bench/results/DEVICE; runs/gpu-rehearsal for a rehearsal)")
    parser.add_argument("--total", type=float, default=TOTAL_S, metavar="S", help="seconds for all (%(default)s)")
    parser.add_argument("--stage", choices=list(RUNS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print(
            f"make gpu: torch {torch.__version__} sees no CUDA device; REHEARSE=1 rehearses on the CPU", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if args.rehearse else "cuda")
    out = args.out or (
        ROOT / "runs" / "gpu-rehearsal" if args.rehearse else ROOT / "bench" / "results" / device_slug(device)
    )
    if args.stage:
        return RUNS[args.stage](Run(device, out, args.rehearse, args.missing))
    return _run_all(args, out)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in RUNS:
            raise argparse.ArgumentTypeError(str(unknown_name("stage", name, RUNS)))
    return names


def _run_all(args: argparse.Namespace, out: Path) -> int:
    record = Record(out / "gpu.json")
    prepare_environment(args.rehearse)
    flags = [flag for flag, given in (("--rehearse", args.rehearse), ("--missing", args.missing)) if given]

    def command(stage: Stage) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), "--stage", stage.name, "--out", str(out), *flags]

    stages = [stage for stage in STAGES if stage.name in args.only]
    if args.missing:
        done = {name for name, found in record.section("stages").items() if found["state"] == DONE}
        stages = [stage for stage in stages if stage.name not in done]
    undone = run_stages(stages, command, record, total_s=args.total, say=lambda text: print(text, flush=True))
    print("\n" + summary(record))
    print(f"\nwritten: {record.path}" + (f"; not done: {', '.join(undone)}" if undone else ""))
    return 1 if undone else 0


def prepare_environment(rehearse: bool) -> None:
    """Let the stages, which inherit it, find the package and the peers, and in a rehearsal the interpreter."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    wheels = sorted(PEERS.glob("*.whl")) if PEERS.is_dir() else []
    if wheels:
        # retention writes into its own package, so every run has a fresh copy in a folder of its own.
        target = ROOT / "runs" / "peers"
        shutil.rmtree(target, ignore_errors=True)
        options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target)]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)], check=False)
        print(
            f"peers: {', '.join(w.name for w in wheels)}"
            if done.returncode == 0
            else "peers: pip could not install them"
        )
        paths.append(str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"


def summary(record: Record) -> str:
    """The goals as a table, and the stages that are not done."""
    lines = []
    for key, goal in record.section("goals").items():
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        stretch = "" if goal["stretch"] is None else f" (stretch {goal['stretch']:g})"
        met = {None: "-", True: "met", False: "MISSED"}[goal["met"]]
        sign = "<=" if goal["at_most"] else ">="
        lines.append(f"{met:7s} {measured:>13s} {sign} {goal['goal']:g}{stretch}  {key}")
    return "\n".join(lines) or "no goals measured"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LinattnError as error:
        print(f"make gpu: {re.sub(chr(10), ' ', str(error))}", file=sys.stderr)
        sys.exit(2)
