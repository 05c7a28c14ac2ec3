"""Experiment tracking: where a trainer sends scalars, figures and hyper-parameters. Off unless a tracker is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from linattn.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Tracker(Protocol):
    """What every tracker offers; a class with these methods needs no other tie to this package.

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
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._writer.add_figure(name, figure, step, close=False)

    def hyperparameters(self, values: Mapping[str, object], results: Mapping[str, float]) -> None:
        shown = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in values.items()
        }
        # run_name="." keeps them in this run's folder; the default would open a second run beside it.
        self._writer.add_hparams(shown, dict(results), run_name=".")

    def close(self) -> None:
        self._writer.close()
