"""Colours and curves that the figures of runs and of sweeps share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn._util.figures import BLUE, GREEN, VERMILION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

OBJECTIVE_COLORS = {"vanilla": BLUE, "denoising": VERMILION, "masked": GREEN}


def size_colors(sizes: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """Choose colours, dark to light with growing size; light enough to read on white."""
    from matplotlib import colormaps

    ordered = sorted(set(sizes))
    return {k: colormaps["viridis"](0.85 * i / max(1, len(ordered) - 1)) for i, k in enumerate(ordered)}


def band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw the mean of several curves as a line with dots, and their range from smallest to largest."""
    columns = list(zip(*curves, strict=True))
    axes.plot(x, [sum(column) / len(column) for column in columns], marker="o", markersize=3, linewidth=1.4, **style)
    lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
