"""Commands whose run can be stopped and resumed: their options, and the checks where two sessions meet.

A command with one run calls `add_arguments`, `checkpoint_to_resume`, `check_unchanged`, `begin` and `train`, in this
order, since its options default to those of the checkpoint. A command with several runs calls `train_or_resume` for
each.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from linattn.errors import ArgumentError, CheckpointError
from linattn.training import tracking
from linattn.training.checkpoint import CHECKPOINT_NAME, read_checkpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from linattn.training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser, *, has_no_figure: bool = True) -> None:
    """Declare --resume, --overwrite, --no-figure and the trackers.

    Args:
        parser: of the command.
        has_no_figure: False for a command that always draws.
    """
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the folder; options are kept unless given"
    )
    start.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a checkpoint")
    if has_no_figure:
        parser.add_argument("--no-figure", action="store_true", help="do not draw, which needs matplotlib")
    tracking.add_arguments(parser)


def given_options(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Collect the options that were given, for a command whose parser leaves out all others.

    Args:
        args: of the command.
        settings: a dataclass with a field for each option.
    """
    return {field.name: getattr(args, field.name) for field in fields(settings) if hasattr(args, field.name)}


def checkpoint_to_resume(path: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """Read the checkpoint if the run is to be resumed; return None if it begins.

    Args:
        path: the checkpoint of the run.
        args: with the options of `add_arguments`.

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


def check_unchanged(
    path: Path, given: Mapping[str, Any], kept: Mapping[str, Any], changeable: Collection[str] = ()
) -> None:
    """Check that the options of a resumed run do not contradict its checkpoint.

    Args:
        path: the run, for the error.
        given: options by name.
        kept: those of the checkpoint.
        changeable: names of options that may differ between sessions.

    Raises:
        CheckpointError: an option has another value than the checkpoint, or none there, and may not change.
    """
    wrong = [n for n, value in given.items() if n not in changeable and (n not in kept or value != kept[n])]
    if wrong:
        clashes = ", ".join(f"{name}={given[name]!r} (the checkpoint has {kept.get(name)!r})" for name in wrong)
        accepted = f"other {', '.join(sorted(changeable))} only" if changeable else "the same options as before"
        raise CheckpointError(
            f"the run in {path} has another {', '.join(wrong)} and cannot go on with {clashes}; accepted: {accepted}"
        )


def begin(trainer: Trainer, checkpoint: dict[str, Any] | None, path: Path, args: argparse.Namespace) -> None:
    """Put the trainer where the last session stopped, and open its tracker.

    Args:
        trainer: at step 0.
        checkpoint: as `checkpoint_to_resume` returns it.
        path: where the checkpoint lies.
        args: with the options of `add_arguments`.

    Raises:
        CheckpointError: the checkpoint does not fit the trainer.
        MissingExtraError: a tracker is not installed.
    """
    if checkpoint is not None:
        trainer.restore(checkpoint, path)
    trainer.tracker = tracking.open_tracker(args, path.parent, resumed_at=trainer.step if args.resume else None)


def train(trainer: Trainer, resume_by: str) -> bool:
    """Train to the end; return False when interrupted, after saying how to go on.

    Args:
        trainer: after `begin`.
        resume_by: the command that resumes it, as the message names it.
    """
    if trainer.run():
        return True
    if trainer.tracker is not None:
        trainer.tracker.close()
    print(f"stopped at step {trainer.step}; go on with: {resume_by}", file=sys.stderr)
    return False


def train_or_resume(trainer: Trainer, args: argparse.Namespace) -> bool:
    """Do one of the runs of a command, or what is left of it; return False when interrupted.

    A run without a checkpoint begins at step 0 even under --resume: the last session may have stopped before it.

    Args:
        trainer: with a folder and with settings that decide its outcome.
        args: with the options of `add_arguments`.

    Raises:
        ArgumentError: a checkpoint is there, and neither --resume nor --overwrite was given.
        CheckpointError: it cannot be read, or is of other settings.
    """
    assert trainer.folder is not None
    path = trainer.folder / CHECKPOINT_NAME
    checkpoint = checkpoint_to_resume(path, args) if path.exists() else None
    if checkpoint is not None:
        check_unchanged(trainer.folder, trainer.settings, checkpoint.get("settings", {}))
    begin(trainer, checkpoint, path, args)
    if not train(trainer, "the same command and --resume"):
        return False
    if trainer.tracker is not None:
        trainer.tracker.hyperparameters(trainer.settings, {"result/validation": trainer.history[-1].validation_loss})
        trainer.tracker.close()
    return True


@contextmanager
def writing_results(folder: Path, command: str) -> Iterator[None]:
    """Say of results that cannot be written that nothing of the training is lost.

    Args:
        folder: where the results go.
        command: the command that trained.

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
