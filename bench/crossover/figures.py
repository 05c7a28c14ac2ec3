"""Figures of the crossover, drawn from a result file only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from linattn._util.figures import BLACK, BLUE, DARK_GREY, GREEN, GREY, VERMILION, add_grid, new_figure, save
from linattn._util.figures import require_matplotlib as require_extra
from linattn.bench.crossover.tables import Group, crossing_of, grouped
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from linattn.bench.measuring.crossing import Crossing
    from linattn.bench.measuring.environment import Environment
    from linattn.bench.measuring.results import Measurement, Results


@dataclass(frozen=True)
class Style:
    """The look of a method in every figure. Colours are Okabe and Ito's, told apart with any colour vision."""

    label: str
    color: str
    line: Literal["-", "--", "-."]
    marker: str


STYLES = {
    SDPA: Style("softmax (SDPA)", DARK_GREY, "--", "o"),
    QUADRATIC_DIRECT: Style("quadratic, direct form", VERMILION, "-.", "D"),
    QUADRATIC_CHUNKED: Style("quadratic, chunked form (linear)", BLUE, "-", "s"),
}
RIVALS = (SDPA, QUADRATIC_DIRECT)
LEAST_MIB = 0.25


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw time, memory and N* of every dtype, direction, batch and number of heads in the results.

    They are `time.png`, `memory.png` and `nstar.png` where there is one of these only, else named after it:
    `time-fp32-forward-b1-h4.png` and so on. Where no memory was measured there is no figure of it.

    Returns:
        the files written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: the folder cannot be written.
    """
    written = []
    parts = parts_of(results.measurements)
    for part, groups in parts.items():
        for stem, draw in (("time", draw_time), ("memory", draw_memory), ("nstar", draw_crossover)):
            if stem == "memory" and all(
                measurement.peak_mib is None for measurements in groups.values() for measurement in measurements
            ):
                continue
            path = folder / (f"{stem}.png" if len(parts) == 1 else f"{stem}-{part}.png")
            save(draw(groups, results.environment), path)
            written.append(path)
    return written


def parts_of(measurements: Iterable[Measurement]) -> dict[str, dict[Group, list[Measurement]]]:
    """Collect the groups by what stands in one figure: a dtype, direction, batch and number of heads, as
    "fp32-forward-b1-h4".
    """
    parts: dict[str, dict[Group, list[Measurement]]] = {}
    for group, members in grouped(measurements).items():
        parts.setdefault(f"{group.dtype}-{group.direction}-b{group.B}-h{group.H}", {})[group] = members
    return parts


def require_matplotlib() -> None:
    """Raise MissingExtraError now rather than after the measurement."""
    require_extra("bench", "drawing figures")


def draw_time(groups: Mapping[Group, Sequence[Measurement]], environment: Environment) -> Figure:
    """Time against N, one column a head size, non-causal above causal: medians, 20-80 % bands, N* as markers."""

    def panel(axes: Axes, group: Group, measurements: Sequence[Measurement]) -> None:
        for method in STYLES:
            _draw_time(
                axes,
                method,
                [
                    measurement
                    for measurement in measurements
                    if measurement.method == method and measurement.median_ms is not None
                ],
            )
        axes.axvline(group.D**2, color=BLACK, linestyle=":", linewidth=1.2)
        for rival in RIVALS:
            _mark_crossing(axes, measurements, rival)

    figure = _panels(groups, panel, "time of one call (ms)", _time_legend())
    _title(figure, "Attention time against sequence length", groups, environment)
    return figure


def draw_memory(groups: Mapping[Group, Sequence[Measurement]], environment: Environment) -> Figure:
    """Draw peak memory beyond the inputs against N, one column a head size, non-causal above causal.

    Peaks below `LEAST_MIB` are pages and thread stacks; the axis ends there.
    """

    def panel(axes: Axes, group: Group, measurements: Sequence[Measurement]) -> None:
        for method, style in STYLES.items():
            # On a logarithmic axis nothing is nowhere.
            points = {
                measurement.problem.N: measurement.peak_mib
                for measurement in measurements
                if measurement.method == method and measurement.peak_mib
            }
            axes.plot(list(points), list(points.values()), color=style.color, linestyle=style.line, linewidth=1.6)

    figure = _panels(groups, panel, "peak beyond the inputs (MiB)", _method_legend())
    for axes in figure.axes:
        axes.set_ylim(bottom=LEAST_MIB)
    _title(figure, "Attention memory against sequence length", groups, environment)
    return figure


def _panels(
    groups: Mapping[Group, Sequence[Measurement]],
    draw: Callable[[Axes, Group, Sequence[Measurement]], None],
    ylabel: str,
    legend: list[Any],
) -> Figure:
    """Draw a grid against N: one column a head size, non-causal above causal."""
    heads = sorted({group.D for group in groups})
    masks = sorted({group.is_causal for group in groups})
    # Legend and title need some width however few the columns are.
    figure = new_figure(max(9.0, 3.5 * len(heads) + 0.5), 3.0 * len(masks) + 1.3)
    grid = figure.subplots(len(masks), len(heads), sharex="col", sharey="row", squeeze=False)
    for group, measurements in groups.items():
        axes = grid[masks.index(group.is_causal)][heads.index(group.D)]
        draw(axes, group, measurements)
        log_axes(axes, [measurement.problem.N for measurement in measurements])
        axes.set_title(f"D = {group.D}, {'causal' if group.is_causal else 'non-causal'}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length N (tokens)")
    for row_axes in grid:
        row_axes[0].set_ylabel(ylabel)
    _legend(figure, legend)
    return figure


def draw_crossover(groups: Mapping[Group, Sequence[Measurement]], environment: Environment) -> Figure:
    """Draw N* against D beside D^2 and the number of features, one panel a mask."""
    masks = sorted({group.is_causal for group in groups})
    figure = new_figure(4.6 * len(masks) + 0.6, 4.9)
    panels = figure.subplots(1, len(masks), sharey=True, squeeze=False)[0]
    heads = sorted({group.D for group in groups})
    for axes, is_causal in zip(panels, masks, strict=True):
        dense = [heads[0] * 2 ** (i / 8) for i in range(-4, 8 * round(math.log2(heads[-1] / heads[0])) + 5)]
        axes.plot(dense, [D * D for D in dense], color=BLACK, linestyle=":", linewidth=1.4)
        flops = [(D + 1) * (D + 2) / 2 * (2 if is_causal else 1) for D in dense]
        axes.plot(dense, flops, color=GREEN, linestyle="--", linewidth=1.4)
        for offset, rival in ((0.97, SDPA), (1.03, QUADRATIC_DIRECT)):
            for group, measurements in groups.items():
                crossing = crossing_of(measurements, rival)
                if group.is_causal == is_causal and crossing is not None:
                    _draw_point(axes, group.D * offset, crossing, STYLES[rival])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(heads, [str(D) for D in heads])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        add_grid(axes)
        axes.set_title("causal" if is_causal else "non-causal", fontsize=10)
        axes.set_xlabel("head size D")
    panels[0].set_ylabel("N* (tokens)")
    _legend(figure, _crossover_legend(masks))
    _title(figure, "Length N* from which the chunked form is the faster one", groups, environment)
    return figure


def _draw_time(axes: Axes, method: Method, measurements: Sequence[Measurement]) -> None:
    if not measurements:
        return
    style = STYLES[method]
    sizes = [measurement.problem.N for measurement in measurements]
    median, low, high = (
        [getattr(measurement, name) for measurement in measurements] for name in ("median_ms", "p20_ms", "p80_ms")
    )
    axes.plot(sizes, median, color=style.color, linestyle=style.line, linewidth=1.6)
    axes.fill_between(sizes, low, high, color=style.color, alpha=0.22, linewidth=0)


def _mark_crossing(axes: Axes, measurements: Sequence[Measurement], rival: Method) -> None:
    crossing = crossing_of(measurements, rival)
    if crossing is None or crossing.value is None:
        return
    curve = {
        measurement.problem.N: measurement.median_ms
        for measurement in measurements
        if measurement.method == QUADRATIC_CHUNKED and measurement.median_ms
    }
    height = _interpolate(curve, crossing.value)
    _draw_marker(axes, crossing.value, height, crossing, STYLES[rival], horizontal=True)


def _draw_point(axes: Axes, D: float, crossing: Crossing, style: Style) -> None:
    if crossing.value is not None:
        _draw_marker(axes, D, crossing.value, crossing, style, horizontal=False)
        return
    faster = crossing.always == "faster"
    edge = crossing.smallest if faster else crossing.largest
    axes.plot([D], [edge], marker="v" if faster else "^", markersize=9, color=style.color, markerfacecolor="white")


def _draw_marker(axes: Axes, x: float, y: float, crossing: Crossing, style: Style, *, horizontal: bool) -> None:
    assert crossing.value is not None
    low, high = max(crossing.low, crossing.smallest), min(crossing.high, crossing.largest)
    spread = [[crossing.value - low], [high - crossing.value]]
    axes.errorbar(
        [x],
        [y],
        xerr=spread if horizontal else None,
        yerr=None if horizontal else spread,
        marker=style.marker,
        markersize=7,
        color=style.color,
        markerfacecolor=style.color if crossing.bracketed else "white",
        markeredgewidth=1.4,
        capsize=3,
        zorder=5,
    )


def _interpolate(curve: Mapping[int, float], at: float) -> float:
    """Interpolate a curve on logarithmic axes at a point within its range."""
    sizes = sorted(curve)
    right = next((i for i, N in enumerate(sizes) if at <= N and i > 0), len(sizes) - 1)
    a, b = sizes[right - 1], sizes[right]
    share = math.log(at / a) / math.log(b / a)
    return math.exp((1 - share) * math.log(curve[a]) + share * math.log(curve[b]))


def log_axes(axes: Axes, sizes: Sequence[int]) -> None:
    """Set N in powers of 2, labelled every other octave, and the other axis in powers of 10."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    powers = range(math.ceil(math.log2(min(sizes))), math.floor(math.log2(max(sizes))) + 1)
    ticks = [2**p for p in powers if (p - powers[-1]) % 2 == 0]
    axes.set_xticks(ticks, [f"{N // 1024}k" if N >= 1024 else str(N) for N in ticks])
    axes.minorticks_off()
    add_grid(axes)


def _time_legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    band = Patch(color=GREY, alpha=0.35, linewidth=0, label="20-80 % of the repeats")
    bound = Line2D([], [], color=BLACK, linestyle=":", linewidth=1.2, label="N = D²")
    return [*_method_legend(), *_marker_legend(), band, bound]


def _method_legend() -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=s.color, linestyle=s.line, linewidth=1.6, label=s.label) for s in STYLES.values()]


def _crossover_legend(masks: Sequence[bool]) -> list[Any]:
    from matplotlib.lines import Line2D

    beyond = {"^": "above the longest N measured", "v": "below the shortest N measured"}
    hollow: dict[str, Any] = {"color": DARK_GREY, "markerfacecolor": "white", "markersize": 8, "linestyle": ""}
    features = {(False,): "C = (D+1)(D+2)/2", (True,): "2C", (False, True): "C (non-causal), 2C (causal)"}[tuple(masks)]
    return [
        Line2D([], [], color=BLACK, linestyle=":", linewidth=1.4, label="D², the textbook bound"),
        Line2D([], [], color=GREEN, linestyle="--", linewidth=1.4, label=f"equal flops: {features}"),
        *_marker_legend(),
        *(Line2D([], [], marker=mark, label=label, **hollow) for mark, label in beyond.items()),
    ]


def _marker_legend() -> list[Any]:
    from matplotlib.lines import Line2D

    names = {SDPA: "N* against SDPA", QUADRATIC_DIRECT: "N* against our direct form"}
    filled = [
        Line2D([], [], color=STYLES[m].color, marker=STYLES[m].marker, markersize=7, linestyle="", label=label)
        for m, label in names.items()
    ]
    hollow = Line2D(
        [],
        [],
        color=DARK_GREY,
        marker="o",
        markersize=7,
        markerfacecolor="white",
        linestyle="",
        label="hollow: not bracketed",
    )
    return [*filled, hollow]


def _legend(figure: Figure, handles: list[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _title(figure: Figure, text: str, groups: Mapping[Group, Sequence[Measurement]], environment: Environment) -> None:
    group = next(iter(groups))
    what = "forward and backward" if group.direction == "training" else "forward"
    details = f"{what}, {group.dtype}, B = {group.B}, H = {group.H}, M = D"
    title(figure, text, f"{details}, {machine_of(environment)}")


def title(figure: Figure, text: str, details: str) -> None:
    """Write a heading, and below it, smaller, what has to be known of the measurement."""
    # The empty lines keep room for the details below the title, whose place is fixed in inches.
    figure.suptitle(f"{text}\n\n", fontsize=13)
    figure.text(0.5, 1 - 0.42 / figure.get_figheight(), details, ha="center", va="top", fontsize=9, color=DARK_GREY)


def machine_of(environment: Environment) -> str:
    """Return version and machine in a line."""
    machine = environment.device
    if environment.slug.startswith("cpu"):
        machine += f", {environment.threads} thread{'s'[: environment.threads != 1]}, {environment.instruction_set}"
    return f"torch {environment.torch}, {machine}"
