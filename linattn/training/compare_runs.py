"""`linattn runs`: list training runs and compare their histories, in a table and a figure.

Works on what trainers leave in their folders anyway, `history.jsonl` with settings in `results.json` or, while a run is
not finished, in `checkpoint.pt`. No tracker has to have been on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linattn._util import figures
from linattn._util.tables import text_table
from linattn.errors import ArgumentError, CheckpointError, DataError, refusal
from linattn.training.checkpoint import CHECKPOINT_NAME, HISTORY_NAME, read_checkpoint
from linattn.training.trainer import Record

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

RESULTS_NAME = "results.json"
HIGHLIGHTED = 7


@dataclass(frozen=True)
class Run:
    """One run as it lies on disk.

    Attributes:
        name: its folder, as seen from the folder that was searched.
        settings: its options, empty where no file holds them.
        history: one record a validation, in order of steps.
        finished: it wrote its results.
    """

    name: str
    settings: dict[str, Any]
    history: list[Record]
    finished: bool

    @property
    def best(self) -> float:
        """Smallest validation loss."""
        return min(record.validation_loss for record in self.history)


# What --sort accepts: the name of a column, and the key to sort by.
ORDERS: dict[str, Callable[[Run], Any]] = {
    "best": lambda run: run.best,
    "last": lambda run: run.history[-1].validation_loss,
    "steps": lambda run: -run.history[-1].step,
    "minutes": lambda run: -run.history[-1].seconds,
    "run": lambda run: run.name,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folders to search, --sort, --top and the figure."""
    parser.add_argument("folders", nargs="*", type=Path, help="where to look for runs, at any depth (default runs)")
    parser.add_argument(
        "--sort", choices=ORDERS, default="best", help="order of the rows (%(default)s validation loss)"
    )
    parser.add_argument("--top", type=int, metavar="N", help="only the first N rows; the figure shows all runs")
    parser.add_argument("--figure", type=Path, default=Path("runs") / "comparison.png", help="PNG (%(default)s)")
    parser.add_argument("--no-figure", action="store_true", help="table only; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Print the table and draw the figure."""
    if args.top is not None and args.top < 1:
        raise refusal(ArgumentError, "--top is too small", given=args.top, accepted="at least 1")
    folders = args.folders or [Path("runs")]
    found = sorted((one for folder in folders for one in find(folder)), key=ORDERS[args.sort])
    if not found:
        raise DataError(
            f"no {HISTORY_NAME} was found below {', '.join(map(str, folders))}; accepted: folders of training runs"
        )
    print(table(found[: args.top]))
    if args.top is not None and args.top < len(found):
        print(f"... and {len(found) - args.top} more")
    if not args.no_figure:
        figures.save(draw(found), args.figure)
        print(f"\n{args.figure}")
    return 0


def find(folder: Path) -> list[Run]:
    """Find all runs below a folder, itself included, by name.

    Raises:
        DataError: there is no such folder, or a history or result in it is not what a trainer writes.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; accepted: a folder that holds training runs")
    return [_read(path.parent, folder) for path in sorted(folder.rglob(HISTORY_NAME)) if path.stat().st_size]


def _read(folder: Path, searched: Path) -> Run:
    path = folder / HISTORY_NAME
    try:
        history = [Record(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; accepted: a history written by a trainer") from error
    results = folder / RESULTS_NAME
    finished = results.is_file()
    name = str(folder.relative_to(searched)) if folder != searched else folder.name
    return Run(name, _settings(folder, results if finished else None), history, finished)


def _settings(folder: Path, results: Path | None) -> dict[str, Any]:
    if results is not None:
        try:
            settings = json.loads(results.read_text())["settings"]
            return dict(settings)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{results} cannot be read: {error}; accepted: results of a trainer") from error
    try:
        settings = read_checkpoint(folder / CHECKPOINT_NAME)["settings"]
    except (CheckpointError, KeyError):
        # A run has no checkpoint before its first validation after step 0; its history is worth a row all the same.
        return {}
    return dict(settings)


def differing(runs: Sequence[Run]) -> list[str]:
    """List the settings that not all runs share, in the order in which they were declared.

    A run that stopped early has settings which say so, and in which text and checksum differ in spelling only; those of
    how long to go on and where to read from are left out.
    """
    ignored = {"sha256", "alphabet", "text", "steps", "minutes"}
    names = dict.fromkeys(name for one in runs for name in one.settings if name not in ignored)
    return [name for name in names if len({repr(one.settings.get(name)) for one in runs if one.settings}) > 1]


def table(runs: Sequence[Run]) -> str:
    """Lay out one line a run: the settings in which these runs differ, how far it got, its losses."""
    shown = differing(runs)
    rows = []
    for one in runs:
        last = one.history[-1]
        settings = [str(one.settings.get(name, "?")) for name in shown]
        state = "finished" if one.finished else "not finished"
        rows.append((one.name, *settings, last.step, last.seconds / 60, last.validation_loss, one.best, state))
    return text_table(("run", *shown, "steps", "minutes", "last", "best", ""), rows)


def draw(runs: Sequence[Run]) -> Figure:
    """Draw validation losses against steps and minutes; the best runs in colour, the others in grey.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures.require_matplotlib("train", "drawing the runs (leave it out with --no-figure)")
    by_loss = sorted(runs, key=ORDERS["best"])
    shown = differing(runs)
    figure = figures.new_figure(12, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    for rank, one in reversed(list(enumerate(by_loss))):
        style: dict[str, Any] = {"color": figures.LIGHT_GREY, "linewidth": 0.8, "zorder": 1}
        if rank < HIGHLIGHTED:
            settings = ", ".join(f"{name} {one.settings.get(name, '?')}" for name in shown[:3])
            label = f"{one.best:.3f}  {settings or one.name}"
            style = {"color": figures.PALETTE[rank], "marker": ".", "label": label, "zorder": 2 + HIGHLIGHTED - rank}
        elif rank == HIGHLIGHTED:
            style["label"] = f"{len(runs) - HIGHLIGHTED} others"
        losses = [record.validation_loss for record in one.history]
        left.plot([record.step for record in one.history], losses, **style)
        right.plot([record.seconds / 60 for record in one.history], losses, **style)
    # Untrained models, at step 0, lie far above everything of interest and may leave the picture.
    trained = [r.validation_loss for one in runs for r in one.history if r.step or len(one.history) == 1]
    margin = 0.05 * (max(trained) - min(trained)) + 0.01
    left.set(xlabel="optimiser steps", ylabel="validation loss", ylim=(min(trained) - margin, max(trained) + margin))
    right.set_xlabel("wall time of training (minutes)")
    for axes in (left, right):
        figures.add_grid(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, title="best loss, settings")
    figure.suptitle(f"{len(runs)} training run{'s'[: len(runs) != 1]}")
    return figure
