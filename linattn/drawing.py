"""Figures as files. Matplotlib is an extra: it is asked for before the work whose outcome it is to draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linattn.errors import DataError, MissingExtraError
from linattn.files import atomic_file

if TYPE_CHECKING:
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
