"""Who wins where: the fastest method over length and head size, drawn from a result file only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from linattn._util.figures import BLACK, DARK_GREEN, LIGHT_GREY, PALE_BLUE, PALE_ORANGE, new_figure, save
from linattn.bench.crossover.figures import STYLES, machine_of, parts_of, title
from linattn.bench.measuring.cases import QUADRATIC_CHUNKED, QUADRATIC_DIRECT, SDPA, Method

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from linattn.bench.crossover.tables import Group
    from linattn.bench.measuring.environment import Environment
    from linattn.bench.measuring.results import Measurement, Results

METHODS = (SDPA, QUADRATIC_DIRECT, QUADRATIC_CHUNKED)
FILL = {SDPA: LIGHT_GREY, QUADRATIC_DIRECT: PALE_ORANGE, QUADRATIC_CHUNKED: PALE_BLUE}
"""Lighter than the lines of the same methods, so that black numbers can be read on them."""


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw `winner.png`: a row of panels for each dtype, direction, batch and number of heads, one panel a mask.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: the folder cannot be written.
    """
    path = folder / "winner.png"
    save(draw_winners(parts_of(results.measurements), results.environment), path)
    return [path]


def draw_winners(parts: Mapping[str, Mapping[Group, Sequence[Measurement]]], environment: Environment) -> Figure:
    """Draw the fastest method at each power of 2 that was measured, and by what factor it beats the next."""
    masks = sorted({group.is_causal for groups in parts.values() for group in groups})
    heads = sorted({group.D for groups in parts.values() for group in groups})
    sizes = sorted(
        {
            measurement.problem.N
            for groups in parts.values()
            for measurements in groups.values()
            for measurement in measurements
        }
    )
    sizes = [N for N in sizes if N & (N - 1) == 0]
    figure = new_figure(max(7.0, (0.75 * len(heads) + 1.6) * len(masks)), (0.27 * len(sizes) + 0.9) * len(parts) + 1.3)
    grid = figure.subplots(len(parts), len(masks), sharex=True, sharey=True, squeeze=False)
    for line, groups in zip(grid, parts.values(), strict=True):
        for axes, is_causal in zip(line, masks, strict=True):
            mine = {group: measurements for group, measurements in groups.items() if group.is_causal == is_causal}
            _panel(axes, mine, heads, sizes, is_causal)
    for axes in grid[-1]:
        axes.set_xlabel("head size D")
    for axes in grid[:, 0]:
        axes.set_ylabel("sequence length N (tokens)")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    title(figure, "The fastest attention, and by what factor it beats the next", f"M = D, {machine_of(environment)}")
    return figure


def factors(measurements: Sequence[Measurement], N: int) -> tuple[Method, float] | None:
    """Return the fastest of the three methods at one length and how many times as fast as the next it is.

    None where fewer than two were measured.
    """
    times = {
        measurement.method: measurement.median_ms
        for measurement in measurements
        if measurement.problem.N == N and measurement.median_ms
    }
    ordered = sorted((ms, METHODS.index(method)) for method, ms in times.items() if method in METHODS)
    if len(ordered) < 2:
        return None
    (best, winner), (second, _) = ordered[:2]
    return METHODS[winner], second / best


def _panel(
    axes: Axes,
    groups: Mapping[Group, Sequence[Measurement]],
    heads: Sequence[int],
    sizes: Sequence[int],
    is_causal: bool,
) -> None:
    from matplotlib.patches import Rectangle

    for group, measurements in groups.items():
        for N in sizes:
            found = factors(measurements, N)
            if found is None:
                continue
            method, factor = found
            column, line = heads.index(group.D), sizes.index(N)
            axes.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, facecolor=FILL[method], edgecolor="white"))
            text = f"{factor:.0f}" if factor >= 9.95 else f"{factor:.1f}"
            # The number stands on its own ground, so that a curve may pass behind it.
            ground = {"facecolor": FILL[method], "edgecolor": "none", "pad": 0.8}
            axes.text(column, line, text, ha="center", va="center", fontsize=7.5, bbox=ground, zorder=4)
    _curve(axes, heads, sizes, [D * D for D in heads], BLACK, ":")
    C = [(D + 1) * (D + 2) // 2 for D in heads]
    _curve(axes, heads, sizes, C, DARK_GREEN, "--")
    if is_causal:
        _curve(axes, heads, sizes, [2 * c for c in C], DARK_GREEN, "-")
    axes.set_xlim(-0.5, len(heads) - 0.5)
    axes.set_ylim(-0.5, len(sizes) - 0.5)
    axes.set_xticks(range(len(heads)), [str(D) for D in heads])
    axes.set_yticks(range(len(sizes)), [f"{N // 1024}k" if N >= 1024 else str(N) for N in sizes], fontsize=8)
    axes.tick_params(length=0)
    if groups:
        shown = next(iter(groups))
        what = "forward and backward" if shown.direction == "training" else "forward"
        mask = "causal" if is_causal else "non-causal"
        axes.set_title(f"{mask}, {shown.dtype}, {what}, B = {shown.B}, H = {shown.H}", fontsize=9)


def _curve(
    axes: Axes, heads: Sequence[int], sizes: Sequence[int], lengths: Sequence[int], color: str, style: str
) -> None:
    """Draw a curve N(D) in a grid whose lines are an octave apart."""
    lines = [math.log2(N / sizes[0]) for N in lengths]
    axes.plot(range(len(heads)), lines, color=color, linestyle=style, linewidth=1.5)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        *(Patch(facecolor=FILL[method], label=f"fastest: {STYLES[method].label}") for method in METHODS),
        Patch(facecolor="white", edgecolor=LIGHT_GREY, label="fewer than two methods measured"),
        Line2D([], [], color=BLACK, linestyle=":", label="N = D²"),
        Line2D([], [], color=DARK_GREEN, linestyle="--", label="N = C = (D+1)(D+2)/2"),
        Line2D([], [], color=DARK_GREEN, linestyle="-", label="N = 2C, equal flops when causal"),
    ]
