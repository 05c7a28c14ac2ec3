"""A training loop that can be interrupted: AdamW, warm-up and cosine decay, validation, history, checkpoints.

A run limited by steps and resumed from a checkpoint continues bit for bit as if it had never stopped (on one machine,
CPU): the checkpoint holds the model, the optimiser, the state of the random number generators and the history, and the
data of step i depend on i alone.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linattn._util.files import atomic_file
from linattn._util.progress import Bar, progress
from linattn.errors import ArgumentError, CheckpointError, refusal
from linattn.training.checkpoint import CHECKPOINT_NAME, HISTORY_NAME, describe_earlier, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import FrameType

    from linattn.training.tracking import Tracker


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. At least one of `steps` and `minutes` is given; the run ends at whichever comes first.

    Attributes:
        steps: number of optimiser steps.
        minutes: wall-clock minutes in the loop, validation included, added up over resumed sessions.
        learning_rate: the peak.
        warmup: share of the run over which the rate rises linearly from 0.
        final_learning_rate: share of the peak that is left at the end of the cosine.
        weight_decay: decoupled decay of matrices; vectors (gains, biases) are not decayed.
        betas: of AdamW.
        clip: largest norm of the whole gradient, None for any.
        validate_every: steps between validations; a checkpoint is written at each, and one before the first step.
        patience: stop early after so many validations in a row without a new lowest loss; None for never.

    Raises:
        ArgumentError: neither or non-positive limits, shares outside [0, 1], rates, norms, intervals and patience that
            are not positive.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 1e-3
    warmup: float = 0.02
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = 1.0
    validate_every: int = 250
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise refusal(
                ArgumentError, "the run has no end", given="neither steps nor minutes", accepted="at least one of them"
            )
        for name in ("steps", "minutes", "learning_rate", "clip", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise refusal(ArgumentError, f"{name} is not positive", given=f"{name}={value}", accepted="above 0")
        for name in ("warmup", "final_learning_rate"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise refusal(ArgumentError, f"{name} is no share", given=f"{name}={value}", accepted="0 to 1")

    @classmethod
    def adam(
        cls,
        *,
        steps: int,
        learning_rate: float,
        validate_every: int,
        final_learning_rate: float = 1.0,
        patience: int | None = None,
    ) -> TrainingConfig:
        """Configure Adam as it was first published: no warm-up, nothing decayed, nothing clipped.

        Args:
            steps: number of optimiser steps.
            learning_rate: the peak.
            validate_every: steps between validations.
            final_learning_rate: share of the peak that is left at the end of the cosine; 1 for a constant rate.
            patience: stop early after so many validations in a row without a new lowest loss; None for never.

        Source: Kingma and Ba 2015, "Adam: A method for stochastic optimization".

        Example:
            >>> TrainingConfig.adam(steps=10, learning_rate=0.1, validate_every=5).rate(0.9)
            0.1
        """
        return cls(
            steps=steps,
            learning_rate=learning_rate,
            warmup=0.0,
            final_learning_rate=final_learning_rate,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            clip=None,
            validate_every=validate_every,
            patience=patience,
        )

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run that is done, 0 to 1, after `step` steps and `seconds` of training."""
        by_step = step / self.steps if self.steps is not None else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return min(1.0, max(by_step, by_time))

    def rate(self, progress: float) -> float:
        """Return the learning rate when that share of the run is done.

        Linear up to `warmup`, then half a cosine down to `final_learning_rate` of the peak.

        Source: Loshchilov and Hutter 2017, "SGDR: Stochastic gradient descent with warm restarts".

        Example:
            >>> config = TrainingConfig(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.0)
            >>> [round(config.rate(share), 3) for share in (0.05, 0.1, 0.55, 1.0)]
            [0.5, 1.0, 0.5, 0.0]
        """
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        past = (progress - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 0.0
        cosine = 0.5 * (1 + math.cos(math.pi * past))
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


@dataclass(frozen=True)
class Record:
    """One line of the history.

    Attributes:
        step: optimiser steps done.
        train_loss: mean over the steps since the line before; None on the first line, before training.
        validation_loss: of the model as it is now.
        learning_rate: of the last step.
        seconds: of training until now, all sessions together.
        measures: what else was measured then, by name; of several repeats trained at once, one number each.
    """

    step: int
    train_loss: float | None
    validation_loss: float
    learning_rate: float
    seconds: float
    measures: dict[str, list[float]] = field(default_factory=dict)


class Trainer:
    """Trains `model` on `loss(step)` until the limit in `config`; call `run`.

    Args:
        model: what is trained, already on its device and seeded.
        loss: loss of step i = 0, 1, ... as a scalar tensor. Its data should depend on i alone (and a seed), then
            resuming is exact.
        validate: validation loss, a number; called in evaluation mode without gradients.
        config: see `TrainingConfig`.
        folder: where `checkpoint.pt` and `history.jsonl` are kept; nothing is written when not given.
        settings: whatever rebuilds model and data, kept in the checkpoint: plain numbers, strings, lists and
            dictionaries.
        tracker: see `linattn.training.tracking`.
        on_record: called with each `Record`.
        measure: numbers by name that go into each `Record` and, as means, to the tracker; called after `validate`, in
            the same mode.
        show_progress: draw a bar, where there is a terminal.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> x = torch.randn(64, 2); y = x.sum(1, keepdim=True)
        >>> objective = lambda: (model(x) - y).square().mean()
        >>> config = TrainingConfig(steps=200, learning_rate=0.1)
        >>> trainer = Trainer(model, lambda step: objective(), lambda: objective().item(), config)
        >>> trainer.run(), trainer.history[-1].validation_loss < 0.01
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[int], Tensor],
        validate: Callable[[], float],
        config: TrainingConfig,
        *,
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
        on_record: Callable[[Record], None] | None = None,
        measure: Callable[[], dict[str, list[float]]] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.loss, self.validate, self.config = model, loss, validate, config
        self.folder, self.settings = folder, dict(settings or {})
        self.tracker, self.on_record, self.measure = tracker, on_record, measure
        self.show_progress = show_progress
        self.step = 0
        self.seconds = 0.0
        self.history: list[Record] = []
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = parameters[0].device
        decayed = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=config.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._loss_count = 0

    @property
    def finished(self) -> bool:
        """Whether the limit is reached or the run was stopped early."""
        return self.config.progress(self.step, self.seconds) >= 1 or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the last `patience` validations all failed to beat the ones before them."""
        patience, losses = self.config.patience, [record.validation_loss for record in self.history]
        return patience is not None and len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])

    def run(self) -> bool:
        """Train to the end, or until Ctrl-C; a second Ctrl-C stops at once.

        The step under way is finished and saved first.

        Returns:
            True when the run is complete, False when it was interrupted.

        Raises:
            ArgumentError: the loss is no longer finite. The checkpoint is the last one before.
            CheckpointError: the checkpoint or the history cannot be written. A previous one is intact.
        """
        started = time.monotonic() - self.seconds
        style = {"bar_format": "{percentage:3.0f}%|{bar}| {elapsed}{postfix}", "leave": False}
        with _stop_requests() as stop_requested, progress(1.0, "run", show=self.show_progress, **style) as bar:
            if not self.history:
                # At once: from here on a killed run can be resumed, and the run that was here before cannot.
                self.save()
                bar.clear()
                self._validate()
            self.model.train()
            while not self.finished:
                self._train_step()
                self.seconds = time.monotonic() - started
                self._draw(bar)
                if self.step % self.config.validate_every == 0 or self.finished:
                    bar.clear()
                    self._validate()
                    self.seconds = time.monotonic() - started
                    self.save()
                if stop_requested() and not self.finished:
                    self.save()
                    return False
        return True

    def _draw(self, bar: Bar) -> None:
        bar.set_postfix_str(f"step {self.step}, validation {self.history[-1].validation_loss:.4f}", refresh=False)
        bar.update(self.config.progress(self.step, self.seconds) - bar.n)

    def _train_step(self) -> None:
        rate = self.config.rate(self.config.progress(self.step + 1, self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.loss(self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Summed on the device: reading every loss would make the host wait for it.
        self._loss_sum += loss.detach()
        self._loss_count += 1
        self.step += 1

    @torch.no_grad()
    def _validate(self) -> None:
        was_training = self.model.training
        self.model.eval()
        validation_loss = float(self.validate())
        measures = self.measure() if self.measure is not None else {}
        self.model.train(was_training)
        train_loss = self._loss_sum.item() / self._loss_count if self._loss_count else None
        self._loss_sum.zero_()
        self._loss_count = 0
        rate = self.optimizer.param_groups[0]["lr"] if self.step else 0.0
        record = Record(self.step, train_loss, validation_loss, rate, self.seconds, measures)
        for name, value in (("training", train_loss), ("validation", validation_loss)):
            if value is not None and not math.isfinite(value):
                raise ArgumentError(
                    f"the {name} loss is {value} at step {self.step} with learning rate {self.config.learning_rate}; "
                    "accepted: settings under which it stays finite, such as a lower learning rate"
                )
        self.history.append(record)
        self._write_history()
        if self.tracker is not None:
            scalars = {"loss/validation": validation_loss, "learning_rate": rate, "seconds": self.seconds}
            scalars |= {f"measure/{name}": sum(values) / len(values) for name, values in measures.items()}
            self.tracker.scalars(self.step, scalars if train_loss is None else {**scalars, "loss/train": train_loss})
        if self.on_record is not None:
            self.on_record(record)

    def _write_history(self) -> None:
        if self.folder is None:
            return
        path = self.folder / HISTORY_NAME
        try:
            with atomic_file(path) as file:
                file.writelines(json.dumps(asdict(record)).encode() + b"\n" for record in self.history)
        except OSError as error:
            earlier = describe_earlier("history", path)
            raise CheckpointError(f"the history {path} cannot be written: {error}; {earlier}") from error

    def save(self) -> None:
        """Write the checkpoint, if there is a folder. It replaces the previous one only when it is complete.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is None:
            return
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        write_checkpoint(
            self.folder / CHECKPOINT_NAME,
            {
                "step": self.step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
                "loss_sum": self._loss_sum,
                "loss_count": self._loss_count,
                "history": [asdict(record) for record in self.history],
                "training": asdict(self.config),
                "settings": self.settings,
            },
        )

    def restore(self, checkpoint: Mapping[str, Any], source: Path) -> None:
        """Take over the state in `checkpoint`, as `read_checkpoint` returns it; `source` names the file in errors.

        The limits, rates and so on of this trainer's own `config` hold from here on.

        Raises:
            CheckpointError: it belongs to another model, or parts of it are missing.
        """
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            torch.set_rng_state(checkpoint["rng"]["cpu"])
            if self.device.type == "cuda" and checkpoint["rng"]["cuda"]:
                torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"])
            self._loss_sum.copy_(checkpoint["loss_sum"])
            self._loss_count = checkpoint["loss_count"]
            self.history = [Record(**record) for record in checkpoint["history"]]
            self.step, self.seconds = checkpoint["step"], checkpoint["seconds"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint {source} does not fit this model and trainer: {error}") from error


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a request that the loop can ask for; the second acts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked.is_set
        return

    def ask(_signal: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
