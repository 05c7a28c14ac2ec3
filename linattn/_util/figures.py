"""Figures as files. Matplotlib is an extra: it is asked for before the work whose outcome it is to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._util.files import atomic_file
from linattn.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def require_matplotlib(extra: str, purpose: str) -> None:
    """Raise MissingExtraError now rather than after the computation."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", extra, purpose) from error


def save(figure: Figure, path: Path, *, dpi: float | None = None) -> None:
    """Write a PNG, complete or not at all.

    Args:
        dpi: the figure's own when not given.

    Raises:
        DataError: it cannot be written; what was there stays as it was.
    """
    try:
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi="figure" if dpi is None else dpi)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; accepted: a folder to write") from error


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis whose ticks read 0.1, 20, 60, 100 rather than powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(2, 0.5)))
