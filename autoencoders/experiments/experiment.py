"""One experiment: R autoencoders of one kind, trained on one set, watched by losses and probes at every validation.

`linattn train ae` runs one and draws it; `linattn sweep ae` runs many and compares them. The trainer is the package's
own, `linattn.training.trainer.Trainer`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linattn.autoencoders.analysis.probe import choose_labelled, probe_accuracy
from linattn.autoencoders.data.sets import SampleSet, check_samples
from linattn.autoencoders.models.autoencoder import Autoencoder, reconstruction_loss
from linattn.autoencoders.models.corruption import AdditiveNoise, Masking
from linattn.autoencoders.models.patches import PatchAutoencoder
from linattn.autoencoders.models.repeats import Repeats, repeats_of
from linattn.errors import ArgumentError, refusal
from linattn.training.trainer import Record, Trainer, TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from linattn.autoencoders.experiments.settings import Settings

# Samples pushed through a model at once where no gradient is needed.
CHUNK = 2000
VALIDATION_SEED = 1_000_003


def build(settings: Settings, data: SampleSet, seed: int) -> Autoencoder | PatchAutoencoder:
    """Build a fresh model with weights from the seed.

    Raises:
        ArgumentError: sizes, names or probabilities that no model can have, patches of what is not an image.
    """
    torch.manual_seed(seed)
    if settings.patch:
        if data.image_shape is None:
            raise refusal(
                ArgumentError,
                f"the set {data.name!r} has no patches",
                given=f"patch={settings.patch}",
                accepted="a set of images",
            )
        return PatchAutoencoder(
            data.image_shape,
            settings.patch,
            settings.hidden[0],
            layers=settings.layers,
            heads=settings.heads,
            kernel=settings.kernel,
            probability=settings.mask if settings.objective == "masked" else 0.0,
        )
    corruption: nn.Module | None = None
    if settings.objective == "denoising":
        corruption = AdditiveNoise(settings.noise)
    elif settings.objective == "masked":
        corruption = Masking(settings.mask)
    return Autoencoder(data.input_size, settings.hidden, settings.activation, corruption=corruption)


class Experiment:
    """R models, their losses and probes, in the form of a `Trainer`: data of step i depend on i and the seeds alone.

    Args:
        settings: see `Settings`.
        data: the set, already on its device; without labels no probe is trained.
        members: the repeats to run, all of `settings.repeats` when not given.

    Raises:
        ArgumentError: settings that do not fit the set.
        DataError: samples that are not finite.
    """

    def __init__(self, settings: Settings, data: SampleSet, members: Sequence[int] | None = None) -> None:
        for name, split in zip(("train", "valid", "test"), data[1:4], strict=True):
            check_samples(split.x, f"split {name!r} of the set {data.name!r}")
        self.settings, self.data = settings, data
        self.device = data.train.x.device
        self.seeds = [settings.seed + r for r in (range(settings.repeats) if members is None else members)]
        self.models: Repeats = repeats_of([build(settings, data, seed).to(self.device) for seed in self.seeds])
        # The sums of losses since the last validation; part of the model so that a checkpoint keeps them.
        self.models.register_buffer("loss_sums", torch.zeros(len(self.seeds), dtype=torch.float64, device=self.device))
        self.models.register_buffer("loss_count", torch.zeros((), dtype=torch.float64, device=self.device))
        self.batches = -(-len(data.train.x) // settings.batch)
        self._orders: tuple[int, Tensor] = (-1, torch.empty(0))
        if data.has_labels:
            self.labelled = choose_labelled(data.valid, settings.probe.labels, settings.seed)

    def trainer(
        self,
        folder: Path | None = None,
        *,
        kept: Mapping[str, Any] | None = None,
        on_record: Callable[[Record], None] | None = None,
        show_progress: bool = True,
    ) -> Trainer:
        """Make the trainer of this experiment.

        Args:
            folder: of checkpoint and history; nothing is written when not given.
            kept: goes into the checkpoint beside the settings.
            on_record: called with each `Record`.
            show_progress: draw a bar, where there is a terminal.
        """
        settings = self.settings
        config = TrainingConfig.adam(
            steps=settings.epochs * self.batches,
            learning_rate=settings.lr,
            validate_every=settings.validate_every * self.batches,
            patience=settings.patience,
        )
        return Trainer(
            self.models,
            self.loss,
            self.validate,
            config,
            folder=folder,
            settings={**asdict(settings), "hidden": list(settings.hidden), **(kept or {})},
            on_record=on_record,
            measure=self.measure,
            show_progress=show_progress,
        )

    def epoch(self, step: int) -> float:
        """Count the passes over the training samples after so many steps."""
        return step / self.batches

    def loss(self, step: int) -> Tensor:
        """Sum the R objectives on batch `step`: each model gets the gradient of its own."""
        losses = self.models.losses(self._batch(step), self.settings.loss, self._generators(step))
        self.models.get_buffer("loss_sums").add_(losses.detach())
        self.models.get_buffer("loss_count").add_(1)
        return losses.sum()

    def validate(self) -> float:
        """Average the objective on the validation split over the repeats, with the same corruption every time."""
        return sum(self._objective()) / len(self.seeds)

    def measure(self) -> dict[str, list[float]]:
        """Measure each repeat: objective on both splits, error of the clean reconstruction, accuracy of a probe (%)."""
        found = {}
        sums, count = self.models.get_buffer("loss_sums"), self.models.get_buffer("loss_count")
        if count > 0:
            found["train"] = (sums / count).tolist()
            sums.zero_()
            count.zero_()
        found["validation"] = self._objective()
        found["reconstruction"] = (
            self._reconstruction() if self.settings.objective != "vanilla" else found["validation"]
        )
        if self.data.has_labels:
            found["accuracy"] = self.accuracy()
        return found

    def accuracy(self) -> list[float]:
        """Train a fresh probe on the codes of each model; return accuracies on the test split in per cent."""
        codes = self.codes(self.data.valid.x[self.labelled])
        test = self.codes(self.data.test.x)
        y = self.data.valid.y[self.labelled]
        config, classes = self.settings.probe, self.data.classes
        found = probe_accuracy(codes, y, test, self.data.test.y, config, classes=classes, seed=self.settings.seed)
        return [100 * share for share in found.tolist()]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Encode samples x `[n, F]` by each model: `[R, n, k]`."""
        return torch.cat([self.models.encode(part) for part in self._chunks(x)], 1)

    @torch.no_grad()
    def _objective(self) -> list[float]:
        x, total = self.data.valid.x, torch.zeros(len(self.seeds), dtype=torch.float64)
        for number, part in enumerate(self._chunks(x)):
            generators = self._generators(VALIDATION_SEED + number)
            total += part.shape[1] * self.models.losses(part, self.settings.loss, generators).double().cpu()
        return [value / len(x) for value in total.tolist()]

    @torch.no_grad()
    def _reconstruction(self) -> list[float]:
        x, total = self.data.valid.x, torch.zeros(len(self.seeds), dtype=torch.float64)
        for part in self._chunks(x):
            found = self.models.reconstruct(part)
            losses = [reconstruction_loss(a, b, self.settings.loss) for a, b in zip(found, part, strict=True)]
            total += part.shape[1] * torch.stack(losses).double().cpu()
        return [value / len(x) for value in total.tolist()]

    def _chunks(self, x: Tensor) -> Iterator[Tensor]:
        for part in x.split(CHUNK):  # type: ignore[no-untyped-call]
            yield part.expand(len(self.seeds), *part.shape)

    def _batch(self, step: int) -> Tensor:
        """Take the samples `[R, B, F]` of a step: each repeat has an order of its own through the training split."""
        epoch, batch = divmod(step, self.batches)
        if self._orders[0] != epoch:
            n = len(self.data.train.x)
            orders = [torch.randperm(n, generator=_seeded("cpu", seed, epoch, 0)) for seed in self.seeds]
            self._orders = epoch, torch.stack(orders).to(self.device)
        start = batch * self.settings.batch
        return self.data.train.x[self._orders[1][:, start : start + self.settings.batch]]

    def _generators(self, step: int) -> list[torch.Generator]:
        return [_seeded(self.device, seed, step, 1) for seed in self.seeds]


def _seeded(device: torch.device | str, seed: int, number: int, purpose: int) -> torch.Generator:
    """Make a generator of its own for every seed, step (or epoch) and purpose."""
    return torch.Generator(device).manual_seed((seed * 2_000_003 + number) * 2 + purpose)


def parameter_count(model: nn.Module) -> int:
    """Count the numbers that a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
