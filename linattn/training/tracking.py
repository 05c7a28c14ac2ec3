"""Experiment tracking: where a trainer sends scalars, figures and hyper-parameters. Off unless a tracker is given.

A command that trains calls `add_arguments` for the flags `--tensorboard` and `--wandb` and `open_tracker` for what was
asked for. `linattn runs` compares runs without either.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from linattn.errors import MissingExtraError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure


class Tracker(Protocol):
    """The methods of every tracker; a class that has them needs no other tie to this package.

    Example:
        >>> class Printer:
        ...     def scalars(self, step, values): print(step, dict(values))
        ...     def figure(self, step, name, figure): pass
        ...     def hyperparameters(self, values, results): pass
        ...     def close(self): pass
        >>> Printer().scalars(10, {"loss/train": 2.5})
        10 {'loss/train': 2.5}
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name, such as "loss/validation", at a step."""

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Log a matplotlib figure at a step."""

    def hyperparameters(self, values: Mapping[str, object], results: Mapping[str, float]) -> None:
        """Log the settings of a finished run beside its results, so that runs can be compared."""

    def close(self) -> None:
        """Write out what is buffered; nothing is logged afterwards."""


class TensorBoardTracker:
    """Writes event files that `tensorboard --logdir FOLDER` shows; one folder a run.

    Args:
        folder: where event files go; created when missing.
        resumed_at: step from which a resumed run goes on; what an earlier session logged after it is hidden.

    Raises:
        MissingExtraError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, *, resumed_at: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tracking", "logging to TensorBoard") from error
        purge = None if resumed_at is None else resumed_at + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Log a figure at a step; it stays open."""
        self._writer.add_figure(name, figure, step, close=False)

    def hyperparameters(self, values: Mapping[str, object], results: Mapping[str, float]) -> None:
        """Log settings beside results."""
        # run_name="." keeps them in this run's folder; the default would open a second run beside it.
        self._writer.add_hparams(_plain(values), dict(results), run_name=".")

    def close(self) -> None:
        """Write out the event file."""
        self._writer.close()


class WandbTracker:
    """Writes a Weights & Biases run into `FOLDER/wandb`, offline: no account is needed and nothing is sent.

    `wandb sync FOLDER/wandb/offline-run-*` uploads it later. A session that resumes a run
    becomes a run of its own in the same group, which is named after the folder.

    Args:
        folder: of the run; its name is the run's name.
        project: under which a later upload files the run.

    Raises:
        MissingExtraError: the package wandb is not installed.
    """

    def __init__(self, folder: str | Path, *, project: str = "linattn") -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "tracking", "logging to Weights & Biases") from error
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._image = wandb.Image
        self._run: Any = wandb.init(
            mode="offline",
            project=project,
            name=folder.name,
            group=folder.name,
            dir=folder,
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name at a step."""
        self._run.log(dict(values), step=step)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Log a figure, as an image, at a step."""
        self._run.log({name: self._image(figure)}, step=step)

    def hyperparameters(self, values: Mapping[str, object], results: Mapping[str, float]) -> None:
        """Log settings as the run's config and results as its summary."""
        self._run.config.update(_plain(values))
        self._run.summary.update(dict(results))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one: each gets everything, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers with every tracker."""
        for tracker in self.trackers:
            tracker.scalars(step, values)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Log a figure with every tracker."""
        for tracker in self.trackers:
            tracker.figure(step, name, figure)

    def hyperparameters(self, values: Mapping[str, object], results: Mapping[str, float]) -> None:
        """Log settings and results with every tracker."""
        for tracker in self.trackers:
            tracker.hyperparameters(values, results)

    def close(self) -> None:
        """Close every tracker."""
        # The others are closed even when one fails.
        with ExitStack() as stack:
            for tracker in reversed(self.trackers):
                stack.callback(tracker.close)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --tensorboard and --wandb."""
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard in the folder of the run")
    parser.add_argument(
        "--wandb",
        action="store_true",
        help="log to Weights & Biases in the folder of the run, offline: nothing is sent",
    )


def open_tracker(args: argparse.Namespace, folder: Path, *, resumed_at: int | None = None) -> Tracker | None:
    """Open the tracker that the flags of `add_arguments` ask for; return None without one.

    Args:
        args: with the options of `add_arguments`.
        folder: of the run.
        resumed_at: step from which a resumed run goes on.

    Raises:
        MissingExtraError: a package that was asked for is not installed.
    """
    trackers: list[Tracker] = []
    if args.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", resumed_at=resumed_at))
    if args.wandb:
        trackers.append(WandbTracker(folder))
    return Trackers(trackers) if len(trackers) > 1 else next(iter(trackers), None)


def _plain(values: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """Turn settings into those that both services take: anything but numbers and strings by its name."""
    return {name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in values.items()}
