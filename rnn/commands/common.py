"""Options and statistics that the training commands of this room share."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from linattn._util import figures
from linattn.training import resume

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def add_counts(parser: argparse.ArgumentParser, counts: Sequence[tuple[str, int, str]]) -> None:
    """Declare options that count something.

    Args:
        parser: of the command.
        counts: name, default and explanation of each.
    """
    for name, default, text in counts:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Declare --seeds, --out, --resume, --overwrite and the trackers.

    Args:
        parser: of the command.
        out: the folder below `runs/` that results go to by default.
    """
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each (default 0)", metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="folder (%(default)s)")
    resume.add_arguments(parser, has_no_figure=False)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation over the seeds; 0 for the deviation of a single one.

    Args:
        values: one a seed.

    Example:
        >>> mean_and_sd([1.0, 2.0, 3.0])
        (2.0, 1.0)
    """
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def require_matplotlib() -> None:
    """Raise MissingExtraError before the training rather than after it."""
    figures.require_matplotlib("train", "drawing the figure of a run")
