"""The main job: from which length on does the linear form of quadratic attention pay? Measured, over N and D.

    python bench/crossover/command.py --quick        from a checkout, installed or not
    linattn crossover --quick                the same, installed
    linattn crossover --full                 every head size, mask, dtype and direction of the README's tables

It writes results.json, results.csv and the figures to --out, after every problem, so that it can be interrupted and run
again: what is there is not measured twice.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from typing import TYPE_CHECKING

from linattn._util.environment import pick_device
from linattn.bench.crossover import exponents, figures, tables, winner_map
from linattn.bench.crossover.sweep import SweepPlan, add_run_arguments, run_sweep, set_threads
from linattn.bench.measuring.cases import DIRECTIONS, DTYPES, QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Problem
from linattn.errors import ArgumentError

if TYPE_CHECKING:
    from linattn.bench.measuring.results import Results

METHODS = (SDPA, QUADRATIC_DIRECT, QUADRATIC_CHUNKED)

QUICK = SweepPlan("quick", 128, 8192, budget_s=0.5, limit_s=1.0, settled_s=1.0, refine=False)
DEFAULT = SweepPlan("default", 128, 16384, budget_s=3.0, limit_s=6.0, settled_s=6.0, refine=True)
FULL = SweepPlan("full", 32, 65536, budget_s=3.0, limit_s=14.0, settled_s=1.5, refine=True)
HEAD_SIZES = {"quick": (16, 32, 64), "default": (16, 32, 64), "full": (16, 32, 64, 128)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn crossover`."""
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="shorter sequences, fewer repeats: under 2 minutes")
    extent.add_argument(
        "--full", action="store_true", help="D up to 128, fp32 and bf16, forward and training: under an hour"
    )
    add_run_arguments(parser, "runs/crossover")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=list(DTYPES),
        help="may be repeated (fp32; on cuda and with --full also bf16)",
    )
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="heads, B = 1 (%(default)s)")
    parser.add_argument("--sizes", type=_sizes, metavar="D,D", help="head sizes instead of the plan's, as 16,32")
    parser.add_argument("--longest", type=int, metavar="N", help="longest sequence instead of the plan's")
    parser.add_argument(
        "--direction",
        action="append",
        choices=DIRECTIONS,
        help="training: forward and backward together; may be repeated (forward; with --full both)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and draw what `args` asks for."""
    if not args.no_figures:
        figures.require_matplotlib()
    device = pick_device(args.device)
    set_threads(args.threads)
    if args.heads < 1:
        raise ArgumentError(f"--heads got {args.heads}; accepted: integers of at least 1")
    plan = _plan(args)
    groups = [
        [Problem(N, D, D, H=args.heads, dtype=dtype, is_causal=causal, direction=direction) for N in plan.sizes()]
        for direction in args.direction or (DIRECTIONS if args.full else DIRECTIONS[:1])
        for dtype in args.dtype or (("fp32", "bf16") if args.full or device.type == "cuda" else ("fp32",))
        for D in args.sizes or HEAD_SIZES[plan.name]
        for causal in (False, True)
    ]
    results = run_sweep("crossover", groups, METHODS, plan, device=device, folder=args.out, fresh=args.fresh)
    path = args.out / "results.json"
    written = [path, path.with_suffix(".csv")]
    if not args.no_figures:
        written += figures.draw_all(results, args.out) + winner_map.draw_all(results, args.out)
    print("\n" + summary(results))
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def summary(results: Results) -> str:
    """Return the lines on N* of every group, together, and how N* grows with D."""
    lines = [f"{results.environment.device}, {results.environment.threads} threads, torch {results.environment.torch}"]
    for group, measurements in tables.grouped(results.measurements).items():
        lines += tables.crossing_lines(group, measurements)
    lines += exponents.crossing_lines(results.measurements)
    return "\n".join(lines)


def _plan(args: argparse.Namespace) -> SweepPlan:
    plan = QUICK if args.quick else FULL if args.full else DEFAULT
    largest = args.longest or plan.largest
    if largest < 2 * plan.smallest:
        raise ArgumentError(f"--longest got {largest}; accepted: integers of at least {2 * plan.smallest}")
    return replace(plan, largest=largest)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: integers, as 16,32") from None
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: integers of at least 1")
    return sizes


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["crossover", *sys.argv[1:]]))
