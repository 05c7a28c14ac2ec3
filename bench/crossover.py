"""The main job: from which length on does the linear form of quadratic attention pay? Measured, over N and D.

    python bench/crossover.py --quick        from a checkout, installed or not
    linattn crossover --quick                the same, installed

It writes results.json, results.csv and the figures to --out, after every problem, so that it can be interrupted and run
again: what is there is not measured twice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from linattn.bench import plots, tables
from linattn.bench.cases import DTYPES, QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Problem
from linattn.bench.crossing import refine
from linattn.bench.environment import describe
from linattn.bench.measure import affordable, measure, useful_gflops
from linattn.bench.memory import MemoryProbe
from linattn.bench.results import Results, Row, resume
from linattn.bench.timing import MIN_ROUNDS, side_by_side
from linattn.environment import pick_device
from linattn.errors import ArgumentError

METHODS = (SDPA, QUADRATIC_DIRECT, QUADRATIC_CHUNKED)


@dataclass(frozen=True)
class Plan:
    """How far and how long: sizes in octaves, seconds of timing a problem, and the longest call worth waiting for."""

    heads: tuple[int, ...]
    smallest: int
    largest: int
    budget_s: float
    limit_s: float
    refine: bool

    def sizes(self) -> list[int]:
        """Powers of 2 from the smallest to the largest."""
        return [N for N in (2**p for p in range(32)) if self.smallest <= N <= self.largest]


QUICK = Plan((16, 32, 64), 128, 8192, budget_s=0.5, limit_s=1.0, refine=False)
DEFAULT = Plan((16, 32, 64), 128, 16384, budget_s=3.0, limit_s=6.0, refine=True)
FULL = Plan((16, 32, 64, 128), 128, 32768, budget_s=8.0, limit_s=20.0, refine=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn crossover`."""
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="shorter sequences, fewer repeats: under 2 minutes")
    extent.add_argument(
        "--full", action="store_true", help="also D = 128, longer sequences, more repeats: about an hour"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/crossover"), help="folder for results (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="may be repeated (fp32; on cuda also bf16)"
    )
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="heads, B = 1 (%(default)s)")
    parser.add_argument("--sizes", type=_sizes, metavar="D,D", help="head sizes instead of the plan's, as 16,32")
    parser.add_argument("--longest", type=int, metavar="N", help="longest sequence instead of the plan's")
    parser.add_argument(
        "--direction",
        choices=("forward", "training"),
        default="forward",
        help="training: forward and backward together",
    )
    parser.add_argument("--threads", type=int, help="torch threads on cpu (default: torch's own choice)")
    parser.add_argument("--no-figures", action="store_true", help="write no figures; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Measure, print and draw what `args` asks for."""
    if not args.no_figures:
        plots.require_matplotlib()
    device = pick_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ArgumentError(f"--threads got {args.threads}; accepted: integers of at least 1")
        torch.set_num_threads(args.threads)
    if args.heads < 1:
        raise ArgumentError(f"--heads got {args.heads}; accepted: integers of at least 1")
    plan = _plan(args)
    dtypes = args.dtype or (["fp32", "bf16"] if device.type == "cuda" else ["fp32"])
    settings: dict[str, object] = {
        "plan": "quick" if args.quick else "full" if args.full else "default",
        "budget_s": plan.budget_s,
        "limit_s": plan.limit_s,
    }
    path = args.out / "results.json"
    environment = describe(device)
    results = Results("crossover", environment, settings)
    if not args.fresh:
        results, aside = resume(path, "crossover", environment, settings)
        if aside:
            print(aside, file=sys.stderr)

    groups = [
        [Problem(N, D, D, H=args.heads, dtype=dtype, is_causal=causal, direction=args.direction) for N in plan.sizes()]
        for dtype in dtypes
        for D in plan.heads
        for causal in (False, True)
    ]
    _announce(groups, results, plan, device, path)
    with MemoryProbe(device) as memory, _progress(sum(map(len, groups))) as bar:
        results.settings["peak_memory"] = memory.how
        sweep = Sweep(results, path, plan, device, memory, bar)
        for problems in groups:
            rows = sweep.group(problems)
            bar.clear()
            print("\n" + tables.report(rows), flush=True)
    written = [path, path.with_suffix(".csv")]
    if not args.no_figures:
        written += plots.draw_all(results, args.out)
    print("\n" + summary(results))
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def summary(results: Results) -> str:
    """The lines on N* of every group, together."""
    lines = [f"{results.environment.device}, {results.environment.threads} threads, torch {results.environment.torch}"]
    for group, rows in tables.grouped(results.rows).items():
        lines += tables.crossing_lines(group, rows)
    return "\n".join(lines)


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, n: int = 1) -> object: ...
    def clear(self) -> object: ...
    def set_postfix_str(self, s: str) -> object: ...


@dataclass
class Sweep:
    """One sweep: measures what is missing from the results and saves after every problem."""

    results: Results
    path: Path
    plan: Plan
    device: torch.device
    memory: MemoryProbe
    bar: Bar

    def group(self, problems: Sequence[Problem]) -> list[Row]:
        """All sizes of one group in rising order, then, where the plan says so, sizes near the crossings."""
        rows = []
        for problem in problems:
            rows += self._rows(problem)
            self.bar.update()
        if self.plan.refine:
            for rival in (SDPA, QUADRATIC_DIRECT):
                for N in refine(tables.crossing_of(rows, rival), [p.N for p in problems]):
                    first = problems[0]
                    self._rows(
                        Problem(N, first.D, first.M, first.B, first.H, first.dtype, first.is_causal, first.direction)
                    )
        wanted = tables.group_of(problems[0])
        return sorted(
            (row for row in self.results.rows if tables.group_of(row.problem) == wanted), key=lambda row: row.problem.N
        )

    def _rows(self, problem: Problem) -> list[Row]:
        found = self.results.rows_of(problem)
        if not found:
            self.bar.set_postfix_str(str(problem))
            methods, skipped = affordable(METHODS, problem, self.results.rows, self.plan.limit_s)
            found = measure(problem, methods, device=self.device, budget_s=self.plan.budget_s, memory=self.memory)
            found += skipped
            self.results.rows += found
            self.results.save(self.path)
        return found


def _plan(args: argparse.Namespace) -> Plan:
    plan = QUICK if args.quick else FULL if args.full else DEFAULT
    heads = args.sizes or plan.heads
    largest = args.longest or plan.largest
    if largest < 2 * plan.smallest:
        raise ArgumentError(f"--longest got {largest}; accepted: integers of at least {2 * plan.smallest}")
    return Plan(heads, plan.smallest, largest, plan.budget_s, plan.limit_s, plan.refine)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: integers, as 16,32") from None
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: integers of at least 1")
    return sizes


def _announce(
    groups: Sequence[Sequence[Problem]], results: Results, plan: Plan, device: torch.device, path: Path
) -> None:
    """Say on stderr what is about to happen and about how long it will take."""
    problems = [p for group in groups for p in group]
    missing = [p for p in problems if not results.rows_of(p)]
    message = (
        f"{len(problems)} problems on {results.environment.slug}, {len(problems) - len(missing)} already in {path}"
    )
    if missing:
        # Before anything is measured: SDPA at the rate it reaches on a middling problem, the others at half of it.
        sample = Problem(1024, 64, 64, H=missing[0].H, dtype=missing[0].dtype)
        q, k, v = sample.inputs(device)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        samples, _ = side_by_side({"sdpa": lambda: sdpa(q, k, v)}, device=device, budget_s=0.1)
        rate = useful_gflops(SDPA, sample) / (min(samples["sdpa"]) / 1e3)
        seconds = 0.0
        for problem in missing:
            calls = [useful_gflops(m, problem) / rate * (1 if m == SDPA else 2) for m in METHODS]
            once = sum(s for s in calls if s <= plan.limit_s)
            # Warm-up, the rounds, and one more call for memory; near a crossing a few sizes are added.
            seconds += max(plan.budget_s, MIN_ROUNDS * once) + 2 * once + 0.3
        message += f"; about {max(1.0, seconds * (1.3 if plan.refine else 1.0) / 60):.0f} min"
    print(message, file=sys.stderr, flush=True)


class _NoBar:
    def update(self, n: int = 1) -> None: ...
    def clear(self) -> None: ...
    def set_postfix_str(self, s: str) -> None: ...


@contextmanager
def _progress(total: int) -> Iterator[Bar]:
    """A progress bar on stderr; none where stderr is no terminal or tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, disable=not sys.stderr.isatty(), file=sys.stderr, unit="problem") as bar:
        yield bar


if __name__ == "__main__":
    from linattn.cli import main

    sys.exit(main(["crossover", *sys.argv[1:]]))
