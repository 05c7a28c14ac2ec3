"""Style of this package's figures, and how they are made and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, told apart with any colour vision.
OBJECTIVE_COLOURS = {"vanilla": "#0072B2", "denoising": "#D55E00", "masked": "#009E73"}
GREY = "#777777"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, its parts kept from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def size_colours(sizes: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """Dark to light with growing size; light enough to read on white."""
    from matplotlib import colormaps

    ordered = sorted(set(sizes))
    return {k: colormaps["viridis"](0.85 * i / max(1, len(ordered) - 1)) for i, k in enumerate(ordered)}


def shared_legend(figure: Figure, columns: int) -> None:
    """One legend below all panels, with everything that any of them shows."""
    found: dict[Any, Any] = {}
    for axes in figure.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles=list(found.values()), labels=list(found), loc="outside lower center", ncols=columns, frameon=False
    )


def band(axes: Axes, x: Sequence[float], curves: Sequence[Sequence[float]], **style: Any) -> None:
    """Mean line with dots of several curves, and the range from the smallest to the largest."""
    columns = list(zip(*curves, strict=True))
    axes.plot(x, [sum(column) / len(column) for column in columns], marker="o", markersize=3, linewidth=1.4, **style)
    lowest, highest = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
