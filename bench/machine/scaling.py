"""Measure time and memory of every operation against the length: `linattn scaling`.

Exponents are fitted with 95 % intervals and stand beside those of the flops that `linattn.cost` counts: 1 for sums, 2
where every query meets every key. Results go to --out after every problem; what is there is not measured twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._util.environment import pick_device
from linattn._util.figures import BLACK, BLUE, DARK_GREY, GREEN, MINT, ORANGE, PURPLE, SKY, VERMILION, new_figure, save
from linattn._util.tables import text_table
from linattn.bench.crossover.exponents import MethodExponents, method_exponents
from linattn.bench.crossover.figures import LEAST_MIB, log_axes, machine_of, require_matplotlib, title
from linattn.bench.crossover.sweep import SweepPlan, add_run_arguments, run_sweep, set_threads
from linattn.bench.crossover.tables import grouped
from linattn.bench.measuring.cases import (
    ARGMAX,
    DTYPES,
    ELU_CHUNKED,
    KERNEL_ATTENTION,
    QUADRATIC_CHUNKED,
    QUADRATIC_DIRECT,
    SDPA,
    Direction,
    Method,
    Problem,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from linattn.bench.measuring.results import Measurement, Results

METHODS = (
    SDPA,
    QUADRATIC_DIRECT,
    QUADRATIC_CHUNKED,
    Method("quadratic recurrent", "quadratic", "recurrent"),
    Method("taylor chunked", "taylor", "chunked"),
    ELU_CHUNKED,
    Method("elu+1 recurrent", "elu+1", "recurrent"),
    KERNEL_ATTENTION,
    ARGMAX,
)
QUICK = SweepPlan("quick", 256, 4096, budget_s=0.3, limit_s=1.0, settled_s=1.0, refine=False)
DEFAULT = SweepPlan("default", 256, 32768, budget_s=2.0, limit_s=5.0, settled_s=5.0, refine=False)
SERIES: tuple[tuple[bool, Direction], ...] = ((False, "forward"), (True, "forward"), (True, "training"))
"""Masks and directions: the recurrent form is causal only, looking up the best key is neither causal nor trained."""

# Okabe and Ito's colours, told apart with any colour vision.
COLORS = (DARK_GREY, VERMILION, BLUE, SKY, PURPLE, GREEN, MINT, ORANGE, BLACK)
HEADINGS = ("group", "method", "up to N", "time: exponent", "of the flops", "peak memory: exponent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn scaling`."""
    parser.add_argument("--quick", action="store_true", help="up to 4096 tokens, fewer repeats: about a minute")
    add_run_arguments(parser, "runs/scaling")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="(%(default)s)")
    parser.add_argument("--head-size", type=int, default=64, metavar="D", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="heads, B = 1 (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and draw what `args` asks for."""
    if not args.no_figures:
        require_matplotlib()
    device = pick_device(args.device)
    set_threads(args.threads)
    plan, D = QUICK if args.quick else DEFAULT, args.head_size
    groups = [
        [Problem(N, D, D, H=args.heads, dtype=args.dtype, is_causal=causal, direction=direction) for N in plan.sizes()]
        for causal, direction in SERIES
    ]
    results = run_sweep("scaling", groups, METHODS, plan, device=device, folder=args.out, fresh=args.fresh)
    print("\n" + text_table(HEADINGS, table(results.measurements)))
    written = [args.out / "results.json", args.out / "results.csv"]
    if not args.no_figures:
        written.append(args.out / "scaling.png")
        save(draw(results), written[-1])
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def table(measurements: Iterable[Measurement]) -> list[tuple[str, ...]]:
    """Format one line a method and group, under `HEADINGS`."""
    return [
        (
            str(found.group),
            found.method.name,
            str(found.longest),
            _or_dash(found.time),
            "-" if found.flops is None else f"{found.flops:.2f}",
            _or_dash(found.memory),
        )
        for found in method_exponents(measurements)
    ]


def draw(results: Results) -> Figure:
    """Time above peak memory against length, one column a group; the legend tells each exponent."""
    groups = grouped(results.measurements)
    exponents = {(g.group, g.method): g for g in method_exponents(results.measurements)}
    methods = list(dict.fromkeys(measurement.method for measurement in results.measurements))
    figure = new_figure(max(7.0, 4.0 * len(groups) + 0.6), 8.2)
    grid = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for (group, measurements), (above, below) in zip(groups.items(), grid.T, strict=True):
        _panel(above, measurements, methods, {m: _time(exponents.get((group, m))) for m in methods}, "median_ms")
        _panel(below, measurements, methods, {m: _memory(exponents.get((group, m))) for m in methods}, "peak_mib")
        above.set_title(str(group), fontsize=10)
        below.set_xlabel("sequence length N (tokens)")
    grid[0][0].set_ylabel("time of one call (ms)")
    grid[1][0].set_ylabel("peak memory beyond the inputs (MiB)")
    grid[1][0].set_ylim(bottom=LEAST_MIB)
    for axes in grid[:, 0]:  # shared along rows; room for the legends
        axes.set_ylim(top=20 * axes.get_ylim()[1])
    group = next(iter(groups))
    details = f"{group.dtype}, D = M = {group.D}, B = {group.B}, H = {group.H}, {machine_of(results.environment)}"
    title(figure, "Time and memory against sequence length; in brackets the exponent of N", details)
    return figure


def _panel(
    axes: Axes, measurements: Sequence[Measurement], methods: Sequence[Method], exponents: Mapping[Method, str], y: str
) -> None:
    for method in methods:
        points = {
            measurement.problem.N: getattr(measurement, y)
            for measurement in measurements
            if measurement.method == method and getattr(measurement, y)
        }
        if points:
            style = "--" if method == SDPA else "-." if method.form == "direct" else "-"
            color = COLORS[methods.index(method) % len(COLORS)]
            label = f"{method.name} ({exponents[method]})"
            axes.plot(list(points), list(points.values()), style, color=color, linewidth=1.6, label=label)
    log_axes(axes, [measurement.problem.N for measurement in measurements])
    if axes.lines:
        axes.legend(fontsize=7.5, frameon=False, loc="upper left")


def _time(found: MethodExponents | None) -> str:
    return f"{found.time.exponent:.2f}" if found and found.time else "no fit"


def _memory(found: MethodExponents | None) -> str:
    return f"{found.memory.exponent:.2f}" if found and found.memory else "no fit"


def _or_dash(law: object) -> str:
    return "-" if law is None else str(law)
