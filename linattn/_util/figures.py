"""Figures: one palette, one style, and files that are written complete or not at all.

Matplotlib is an extra: `require_matplotlib` is called before the work whose outcome is to be drawn.

Example:
    >>> from linattn._util import figures
    >>> figure = figures.new_figure(6, 4)
    >>> axes = figure.subplots()
    >>> lines = axes.plot([1, 2, 4], [3, 5, 9], color=figures.BLUE, label="measured")
    >>> figures.add_grid(axes)
    >>> figures.add_legend_below(figure, columns=2)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from linattn._util.files import atomic_file
from linattn.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color universal design": told apart with every common kind of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
# For figures with more curves than these.
WINE, OLIVE, LIME, MINT, DARK_GREEN = "#882255", "#888800", "#66CC66", "#88C9A1", "#006B4F"
# For areas behind text.
PALE_BLUE, PALE_ORANGE = "#8FC1E3", "#F2B58B"
DARK_GREY, GREY, LIGHT_GREY, GRID_GREY = "#444444", "#777777", "#BBBBBB", "#DDDDDD"
# The order in which curves that have no colour of their own take them.
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, WINE, GREY)
DPI = 160


def require_matplotlib(extra: str, purpose: str) -> None:
    """Check that figures can be drawn, before the computation rather than after it.

    Args:
        extra: the extra of this package that installs matplotlib.
        purpose: the work that needs it, as it stands in the error.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401  # imported for the error alone
    except ImportError as error:
        raise MissingExtraError("matplotlib", extra, purpose) from error


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure whose parts are kept from overlapping.

    Args:
        width: inches.
        height: inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, complete or not at all.

    Args:
        figure: as `new_figure` makes it.
        path: the file; folders above it are made.

    Raises:
        DataError: it cannot be written; an earlier file stays as it was.
    """
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; accepted: a folder to write") from error


def add_grid(
    axes: Axes, *, axis: Literal["both", "x", "y"] = "both", which: Literal["major", "both"] = "major"
) -> None:
    """Draw a light grid.

    Args:
        axes: the panel.
        axis: the axis whose ticks the lines start from.
        which: "both" for the minor ticks too.
    """
    axes.grid(True, axis=axis, which=which, color=GRID_GREY, linewidth=0.6)


def add_legend_below(
    figure: Figure, *, columns: int, handles: Sequence[Any] | None = None, fontsize: float | None = None
) -> None:
    """Draw one legend below all panels.

    Args:
        figure: with its panels drawn.
        columns: entries side by side.
        handles: the entries; every labelled curve of any panel when not given, each label once.
        fontsize: points; matplotlib's own when not given.
    """
    if handles is None:
        found: dict[str, Any] = {}
        for axes in figure.axes:
            found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        handles = list(found.values())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=fontsize)


def set_log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with ticks that read 0.1, 20, 60, 100 rather than powers of ten.

    Args:
        axes: the panel.
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
