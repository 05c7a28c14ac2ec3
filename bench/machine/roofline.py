"""Place each kernel below the limits of its machine: `linattn roofline`.

The ceilings are measured in the same run, before and after the kernels: the bandwidth of a large copy, and the rate of
a large matrix product by torch in each dtype. A kernel's place is its useful work in a second (`useful_gflops`) over
its intensity, that work divided by the bytes that must cross to and from memory (`least_bytes`). The same code takes a
GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from linattn._util.environment import pick_device
from linattn._util.figures import BLACK, DARK_GREY, GREEN, add_grid, new_figure, save
from linattn._util.progress import progress
from linattn._util.tables import text_table
from linattn.bench.crossover.figures import STYLES, Style, machine_of, require_matplotlib, title
from linattn.bench.crossover.sweep import add_run_arguments, set_threads
from linattn.bench.measuring.cases import (
    DIRECTIONS,
    ELU_CHUNKED,
    QUADRATIC_CHUNKED,
    QUADRATIC_DIRECT,
    SDPA,
    Problem,
)
from linattn.bench.measuring.ceilings import Ceilings, Extent, calls_to_time, reached
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.measure import least_bytes, measure
from linattn.bench.measuring.results import Measurement, Results
from linattn.bench.measuring.timing import side_by_side
from linattn.errors import DataError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = (SDPA, QUADRATIC_DIRECT, QUADRATIC_CHUNKED, ELU_CHUNKED)
LOOKS = {**STYLES, ELU_CHUNKED: Style("elu+1, chunked form", GREEN, "-", "^")}
EXTENTS = {"cpu": Extent(2**28, 2048), "cuda": Extent(2**31, 8192)}
CEILINGS_S = 1.5
HEADINGS = (
    "dtype", "method", "pass", "N", "flop/byte", "GFLOP/s", "ceiling", "share", "bound by",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One row below the ceilings: intensity in flop/byte, rate and ceiling in GFLOP/s."""

    measurement: Measurement
    intensity: float
    rate: float
    ceiling: float
    bound: str


def measure_ceilings(device: torch.device, dtypes: Sequence[str], budget_s: float = CEILINGS_S) -> Ceilings:
    """Measure copy and products side by side; return medians."""
    extent = EXTENTS[device.type]
    samples, _ = side_by_side(calls_to_time(extent, dtypes, device), device=device, budget_s=budget_s)
    return reached(extent, samples)


def higher(a: Ceilings, b: Ceilings) -> Ceilings:
    """Return the higher of each: a ceiling is what the machine can do when nothing disturbs it."""
    rates = {dtype: max(rate, b.matmul_gflops[dtype]) for dtype, rate in a.matmul_gflops.items()}
    return Ceilings(max(a.copy_gb_s, b.copy_gb_s), rates)


def ceilings_of(results: Results) -> Ceilings:
    """Return the ceilings that a result file carries.

    Raises:
        DataError: it has none.
    """
    found = results.settings.get("ceilings")
    if not isinstance(found, dict):
        raise DataError(f"a result file of kind {results.kind!r} has no ceilings; accepted: kind 'roofline'")
    return Ceilings(**found)


def places(measurements: Iterable[Measurement], ceilings: Ceilings) -> list[Place]:
    """Find where each measurement lies."""
    found = []
    for measurement in measurements:
        if measurement.gflops is None or measurement.gflops_per_s is None:
            continue
        intensity, dtype = measurement.gflops * 1e9 / least_bytes(measurement.problem), measurement.problem.dtype
        bound = "memory" if ceilings.copy_gb_s * intensity < ceilings.matmul_gflops[dtype] else "products"
        found.append(Place(measurement, intensity, measurement.gflops_per_s, ceilings.at(intensity, dtype), bound))
    return found


def table(results: Results) -> list[tuple[str, ...]]:
    """Format one line a measurement, under `HEADINGS`."""
    return [
        (
            place.measurement.problem.dtype,
            place.measurement.method.name,
            "forward and backward" if place.measurement.problem.direction == "training" else "forward",
            str(place.measurement.problem.N),
            f"{place.intensity:.0f}",
            f"{place.rate:.0f}",
            f"{place.ceiling:.0f}",
            f"{100 * place.rate / place.ceiling:.0f} %",
            place.bound,
        )
        for place in places(results.measurements, ceilings_of(results))
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn roofline`."""
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--head-size", type=int, default=64, metavar="D", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="heads, B = 1 (%(default)s)")
    parser.add_argument(
        "--budget", type=float, default=5.0, metavar="S", help="seconds of timing a problem (%(default)s)"
    )
    add_run_arguments(parser, "runs/roofline")


def run(args: argparse.Namespace) -> int:
    """Measure ceilings and kernels, print the table, draw the figure."""
    if not args.no_figures:
        require_matplotlib()
    device = pick_device(args.device)
    set_threads(args.threads)
    dtypes = ("fp32", "bf16")
    before, measurements = measure_ceilings(device, dtypes), []
    problems = [
        Problem(args.length, args.head_size, args.head_size, H=args.heads, dtype=dtype, is_causal=True, direction=way)
        for dtype, way in product(dtypes, DIRECTIONS)
    ]
    with progress(len(problems), "problem") as bar:
        for problem in problems:
            bar.set_postfix_str(str(problem))
            measurements += measure(problem, METHODS, device=device, budget_s=args.budget)
            bar.update()
    ceilings = higher(before, measure_ceilings(device, dtypes))
    settings: dict[str, object] = {"plan": "default", "budget_s": args.budget, "ceilings": asdict(ceilings)}
    results = Results("roofline", describe(device), settings, measurements)
    path = args.out / "results.json"
    results.save(path)
    written = [path]
    if not args.no_figures:
        written.append(args.out / "roofline.png")
        save(draw(results), written[-1])
    print(describe_ceilings(ceilings))
    print(text_table(HEADINGS, table(results)))
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def describe_ceilings(ceilings: Ceilings) -> str:
    """Format the ceilings in a line."""
    rates = ", ".join(f"{dtype} products {rate:.0f} GFLOP/s" for dtype, rate in ceilings.matmul_gflops.items())
    return f"copy {ceilings.copy_gb_s:.1f} GB/s (read and written), {rates}"


def draw(results: Results) -> Figure:
    """Draw rate over intensity below the ceilings, a panel a dtype; hollow: forward and backward."""
    ceilings = ceilings_of(results)
    found = places(results.measurements, ceilings)
    dtypes = [dtype for dtype in ceilings.matmul_gflops if any(p.measurement.problem.dtype == dtype for p in found)]
    figure = new_figure(max(7.0, 4.8 * len(dtypes) + 0.6), 5.4)
    for axes, dtype in zip(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0], dtypes, strict=True):
        _panel(axes, [place for place in found if place.measurement.problem.dtype == dtype], ceilings, dtype)
        axes.set_xlabel("intensity (useful flop / byte that must move)")
        axes.set_title(f"{dtype}: products {ceilings.matmul_gflops[dtype]:.0f} GFLOP/s, copy "
                       f"{ceilings.copy_gb_s:.0f} GB/s", fontsize=10)  # fmt: skip
    figure.axes[0].set_ylabel("useful work (GFLOP/s)")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    problem = results.measurements[0].problem
    details = f"causal, N = {problem.N}, D = M = {problem.D}, B = {problem.B}, H = {problem.H}"
    title(figure, "Each kernel below the limits of its machine", f"{details}, {machine_of(results.environment)}")
    return figure


def _panel(axes: Axes, found: Sequence[Place], ceilings: Ceilings, dtype: str) -> None:
    peak = ceilings.matmul_gflops[dtype]
    ridge = peak / ceilings.copy_gb_s
    right = 2 * max([ridge, *(place.intensity for place in found)])
    left = min([ridge, *(place.intensity for place in found)]) / 4
    axes.plot([left, ridge, right], [left * ceilings.copy_gb_s, peak, peak], color=BLACK, linewidth=1.5)
    for place in found:
        style = LOOKS[place.measurement.method]
        hollow = place.measurement.problem.direction == "training"
        axes.plot(place.intensity, place.rate, style.marker, color=style.color, markersize=8, markeredgewidth=1.4,
                  markerfacecolor="white" if hollow else style.color)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    add_grid(axes)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    kernels = [Line2D([], [], color=s.color, marker=s.marker, linestyle="", label=s.label) for s in LOOKS.values()]
    hollow = Line2D([], [], color=DARK_GREY, marker="o", markerfacecolor="white", linestyle="")
    hollow.set_label("hollow: forward and backward")
    return [*kernels, hollow, Line2D([], [], color=BLACK, linewidth=1.5, label="measured limits")]
