"""What the training commands of this room share: plain Adam, and runs that can be resumed."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from linattn._util import figures
from linattn.errors import CheckpointError
from linattn.training import tracking
from linattn.training.trainer import CHECKPOINT_NAME, Trainer, TrainingConfig, read_checkpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def adam(steps: int, learning_rate: float, validate_every: int, *, final_learning_rate: float = 1.0) -> TrainingConfig:
    """Adam as it was first published: nothing decayed, nothing clipped; the rate constant unless told otherwise."""
    return TrainingConfig(
        steps=steps,
        learning_rate=learning_rate,
        warmup=0.0,
        final_learning_rate=final_learning_rate,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=float("inf"),
        validate_every=min(validate_every, steps),
    )


def add_counts(parser: argparse.ArgumentParser, counts: Sequence[tuple[str, int, str]]) -> None:
    """Declare options that count something: name, default and what is counted."""
    for name, default, text in counts:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Declare --seeds, --out, --resume, --overwrite and the trackers."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each (default 0)", metavar="SEED")
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="folder (%(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on where the runs in the folder stopped")
    start.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds runs")
    tracking.add_arguments(parser)


def train(trainer: Trainer, args: argparse.Namespace) -> bool:
    """Run a trainer that has a folder, by the options above; False when it was interrupted, after saving.

    Raises: CheckpointError for a checkpoint in the folder that is in the way, or is of other settings.
    """
    assert trainer.folder is not None
    path = trainer.folder / CHECKPOINT_NAME
    if path.exists() and not (args.resume or args.overwrite):
        raise CheckpointError(f"{trainer.folder} holds a run already; accepted: --resume, --overwrite or another --out")
    if path.exists() and args.resume:
        checkpoint = read_checkpoint(path)
        found = checkpoint.get("settings", {})
        other = {name for name in {*found, *trainer.settings} if found.get(name) != trainer.settings.get(name)}
        if other:
            raise CheckpointError(
                f"the run in {trainer.folder} has another {', '.join(sorted(other))}; accepted: the same"
            )
        trainer.restore(checkpoint, path)
    trainer.tracker = tracking.open_tracker(args, trainer.folder, resumed_at=trainer.step if args.resume else None)
    finished = trainer.run()
    if trainer.tracker is not None:
        trainer.tracker.hyperparameters(trainer.settings, {"result/validation": trainer.history[-1].validation_loss})
        trainer.tracker.close()
    if not finished:
        print(f"stopped at step {trainer.step}; go on with the same command and --resume", file=sys.stderr)
    return finished


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Over the seeds; the standard deviation of a single one is 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def require_matplotlib() -> None:
    """Raise MissingExtraError now rather than after training."""
    figures.require_matplotlib("train", "drawing the figure of a run")
