"""Training commands whose run can be stopped and gone on with: options, and what happens where sessions meet."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from linattn.errors import ArgumentError, CheckpointError
from linattn.training import tracking
from linattn.training.trainer import Trainer, read_checkpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --resume, --overwrite, --no-figure and the trackers."""
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the folder; options are kept unless given"
    )
    start.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a checkpoint")
    parser.add_argument("--no-figure", action="store_true", help="do not draw, which needs matplotlib")
    tracking.add_arguments(parser)


def checkpoint_to_go_on_with(path: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint if the run is to be resumed, None if it begins.

    Raises:
        ArgumentError: a checkpoint is there, and neither --resume nor --overwrite was given.
        CheckpointError: it cannot be read.
    """
    if args.resume:
        return read_checkpoint(path)
    if path.exists() and not args.overwrite:
        raise ArgumentError(
            f"{path} exists; accepted: --resume to go on with it, --overwrite to begin anew, or another --out"
        )
    return None


def check_unchanged(path: Path, asked: Mapping[str, Any], had: Mapping[str, Any], changeable: Collection[str]) -> None:
    """Raise CheckpointError where an option asks for another value than the checkpoint has, unless it may change."""
    wrong = [name for name, value in asked.items() if name not in changeable and value != had[name]]
    if wrong:
        clashes = ", ".join(f"{name}={asked[name]!r} (the checkpoint has {had[name]!r})" for name in wrong)
        raise CheckpointError(
            f"the run in {path} cannot go on with {clashes}; accepted: other {', '.join(sorted(changeable))} only"
        )


def begin(trainer: Trainer, checkpoint: dict[str, Any] | None, path: Path, args: argparse.Namespace) -> None:
    """Put the trainer where the last session stopped, and open its tracker."""
    if checkpoint is not None:
        trainer.restore(checkpoint, path)
    trainer.tracker = tracking.open_tracker(args, path.parent, resumed_at=trainer.step if args.resume else None)


def train(trainer: Trainer, command: str) -> bool:
    """Train to the end; False when interrupted, having said how to go on."""
    if trainer.run():
        return True
    if trainer.tracker is not None:
        trainer.tracker.close()
    print(f"stopped at step {trainer.step}; go on with: {command} --resume", file=sys.stderr)
    return False


@contextmanager
def writing_results(folder: Path, command: str) -> Iterator[None]:
    """Say of results that cannot be written that nothing of the training is lost.

    Raises:
        CheckpointError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the results in {folder} cannot be written: {error}; the checkpoint is complete, "
            f"write them again with: {command} --resume"
        ) from error
