"""Figures of a GPU's results, drawn from the record alone: goals beside what was reached, and N*."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn._util.figures import BLUE, DARK_GREY, VERMILION, add_grid, new_figure, save

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from linattn.bench.gpu.stages import Record


def draw_all(record: Record, folder: Path) -> list[Path]:
    """Draw what the record holds; returns the files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    written = []
    device = ", ".join(found["device"] for found in record.section("environment").values())
    goals = {key: goal for key, goal in record.section("goals").items() if goal["measured"] is not None}
    sweeps = record.section("crossover")
    if goals:
        written.append(folder / "goals.png")
        save(draw_goals(goals, device), written[-1])
    if sweeps:
        written.append(folder / "crossover.png")
        save(draw_sweeps(sweeps, device), written[-1])
    return written


def draw_goals(goals: dict[str, Any], device: str) -> Figure:
    """Draw what was reached as a multiple of each goal: right of 1 is met."""
    figure = new_figure(10.0, 1.4 + 0.28 * len(goals))
    axes = figure.subplots()
    ratios = [
        goal["goal"] / goal["measured"] if goal["at_most"] else goal["measured"] / goal["goal"]
        for goal in goals.values()
    ]
    places = range(len(goals))
    axes.barh(places, ratios, color=[BLUE if ratio >= 1 else VERMILION for ratio in ratios])
    axes.axvline(1.0, color=DARK_GREY, linestyle="--", linewidth=1.2)
    axes.set_yticks(places, list(goals), fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("reached, as a multiple of the goal")
    axes.set_title(f"Goals on {device}", fontsize=10)
    return figure


def draw_sweeps(sweeps: dict[str, Any], device: str) -> Figure:
    """Time against length of the chunked and direct forms and of the fastest softmax, one panel a case."""
    columns = min(4, len(sweeps))
    rows = -(-len(sweeps) // columns)
    figure = new_figure(max(6.0, 3.3 * columns), 3.0 * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (key, found) in zip(grid.flat, sweeps.items(), strict=False):
        for name, label, color, style in (
            ("chunked", "quadratic, chunked", BLUE, "s-"),
            ("direct", "quadratic, direct", VERMILION, "D-."),
            ("softmax", "fastest softmax", DARK_GREY, "o--"),
        ):
            times = found["ms"][name]
            axes.plot([int(N) for N in times], list(times.values()), style, color=color, label=label, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{key}\n{found['text']}", fontsize=8)
        axes.set_xlabel("N (tokens)")
        add_grid(axes)
    grid[0][0].set_ylabel("ms, forward")
    grid[0][0].legend(fontsize=7)
    figure.suptitle(f"Chunked quadratic form against softmax on {device}", fontsize=10)
    return figure
