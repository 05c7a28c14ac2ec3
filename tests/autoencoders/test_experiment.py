"""Repeats trained as one or one by one, the experiment's losses and measures, resuming, early stopping."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linattn.autoencoders import (
    Autoencoder,
    Batched,
    DenoisingAutoencoder,
    Experiment,
    MaskedAutoencoder,
    ProbeConfig,
    SampleSet,
    Separate,
    Settings,
    Split,
    repeats_of,
)
from linattn.errors import ArgumentError, CheckpointError, DataError
from linattn.training.checkpoint import CHECKPOINT_NAME, read_checkpoint

SMALL = Settings(hidden=(6, 3), batch=16, epochs=3, repeats=3, probe=ProbeConfig(labels=20, epochs=5))


def small_set(labels: bool = True, size: int = 64) -> SampleSet:
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        x = torch.randn(n, size // 8, generator=generator) @ torch.randn(size // 8, size, generator=generator) / 3
        return Split(x, (x.sum(1) > 0).long() if labels else torch.empty(0, dtype=torch.int64))

    return SampleSet("small", split(70), split(40), split(30), (8, size // 8))


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


# ---- Repeats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", [Autoencoder, DenoisingAutoencoder, MaskedAutoencoder])
def test_models_trained_as_one_end_where_they_end_alone(kind: type[Autoencoder], reduction: str) -> None:
    def train(repeats: Batched | Separate, x: Tensor) -> None:
        optimizer = torch.optim.Adam(repeats.parameters(), lr=0.01)
        generators = seeded(3)
        for _ in range(5):
            optimizer.zero_grad()
            repeats.losses(x, reduction, generators).sum().backward()
            optimizer.step()

    models = [kind(9, [7, 4], "tanh", dtype=torch.float64) for _ in range(3)]
    x = torch.randn(3, 10, 9, dtype=torch.float64)
    batched, separate = Batched(models), Separate(models)
    torch.testing.assert_close(batched.losses(x, reduction, seeded(3)), separate.losses(x, reduction, seeded(3)))
    train(batched, x)
    train(separate, x)  # which trains the models themselves: the batched ones are copies
    for r, model in enumerate(models):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(batched.member(r).state_dict()[name], value)
    with torch.no_grad():
        torch.testing.assert_close(batched.encode(x), separate.encode(x))
        torch.testing.assert_close(batched.reconstruct(x), separate.reconstruct(x))


def test_what_is_faster_as_one_is_trained_as_one() -> None:
    assert isinstance(repeats_of([Autoencoder(64, 5) for _ in range(3)]), Batched)
    assert isinstance(repeats_of([Autoencoder(64, 5)]), Separate)
    for inputs, hidden in ((784, 5), (64, (256, 100))):  # many inputs, many parameters
        assert isinstance(repeats_of([Autoencoder(inputs, hidden) for _ in range(2)]), Separate)
    with pytest.raises(ArgumentError, match="different architectures"):
        Batched([Autoencoder(9, 4), Autoencoder(9, 5)])


# ---- Experiment -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["vanilla", "denoising", "masked"])
def test_repeats_together_measure_what_each_measures_alone(objective: str) -> None:
    data, settings = small_set(), replace(SMALL, objective=objective)
    together = Experiment(settings, data).trainer()
    together.run()
    assert isinstance(together.model, Batched)
    for r in range(3):
        alone = Experiment(settings, data, [r]).trainer()
        alone.run()
        for a, b in zip(together.history, alone.history, strict=True):
            assert a.measures.keys() == b.measures.keys()
            for name in a.measures:
                assert a.measures[name][r] == pytest.approx(b.measures[name][0], rel=1e-4), name


def test_measures_are_what_they_say() -> None:
    data, settings = small_set(), replace(SMALL, objective="masked", repeats=1, epochs=1, loss="mean")
    experiment = Experiment(settings, data)
    trainer = experiment.trainer()
    trainer.run()
    first, last = trainer.history
    assert "train" not in first.measures
    assert last.step == 5
    assert last.train_loss == pytest.approx(last.measures["train"][0], rel=1e-6)
    assert last.validation_loss == last.measures["validation"][0]
    clean = (experiment.models.member(0)(data.valid.x) - data.valid.x).square().mean().item()
    assert last.measures["reconstruction"][0] == pytest.approx(clean, rel=1e-5)
    assert last.measures["validation"][0] != pytest.approx(clean, rel=1e-4)
    assert 0 <= last.measures["accuracy"][0] <= 100
    assert experiment.validate() == last.validation_loss  # the same corruption every time


def test_every_sample_is_seen_once_an_epoch_in_an_order_of_each_repeats_own() -> None:
    data = small_set()
    experiment = Experiment(SMALL, data)
    epochs = [torch.cat([experiment._batch(step) for step in range(5 * e, 5 * e + 5)], 1) for e in range(2)]
    for seen in (*epochs[0], *epochs[1]):
        assert torch.equal(seen.sort(0).values, data.train.x.sort(0).values)
    assert not torch.equal(epochs[0][0], epochs[0][1])
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data, settings = small_set(), replace(SMALL, objective="denoising")
    whole = Experiment(settings, data).trainer()
    whole.run()
    first = Experiment(replace(settings, epochs=1), data).trainer(tmp_path)
    first.run()
    second = Experiment(settings, data).trainer(tmp_path)
    second.restore(read_checkpoint(tmp_path / CHECKPOINT_NAME), tmp_path)
    second.run()
    assert [r.measures for r in second.history] == [r.measures for r in whole.history]
    kept = read_checkpoint(tmp_path / CHECKPOINT_NAME)["settings"]
    assert Settings.from_plain(kept) == settings
    with pytest.raises(CheckpointError, match="the settings hidden are missing"):
        Settings.from_plain({name: value for name, value in kept.items() if name != "hidden"})


def test_early_stopping() -> None:
    settings = replace(SMALL, epochs=60, lr=0.5, patience=2, repeats=1)
    trainer = Experiment(settings, small_set()).trainer()
    assert trainer.run()
    assert trainer.stopped_early
    assert trainer.step < 60 * 5
    losses = [record.validation_loss for record in trainer.history]
    assert min(losses[-2:]) >= min(losses[:-2])
    assert all(min(losses[i - 1 : i + 1]) < min(losses[: i - 1]) for i in range(2, len(losses) - 1))


def test_without_labels_there_are_losses_and_no_probe() -> None:
    experiment = Experiment(SMALL, small_set(labels=False))
    assert experiment.measure().keys() == {"validation", "reconstruction"}


def test_nan_in_any_split_is_named_before_work_starts() -> None:
    for name in ("train", "valid", "test"):
        data = small_set()
        getattr(data, name).x[3, 2] = torch.nan
        with pytest.raises(DataError, match=f"split '{name}' of the set 'small' has 1 entries that are NaN"):
            Experiment(SMALL, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "denoise"}, "Did you mean 'denoising'"),
        ({"hidden": (0,)}, "hidden_sizes .* given: 0"),
        ({"hidden": ()}, "at least one size"),
        ({"activation": "rleu"}, "Did you mean 'relu'"),
        ({"objective": "masked", "mask": 1.0}, r"given: 1\.0; accepted: .* \[0, 1\)"),
        ({"objective": "denoising", "noise": -1.0}, r"given: -1\.0"),
        ({"loss": "sums"}, "Did you mean 'sum'"),
        ({"epochs": 0}, "epochs is too small; given: epochs=0; accepted: at least 1"),
        ({"batch": 0}, "batch=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"lr": 0.0}, "learning_rate=0.0"),
        ({"patience": 0}, "patience=0"),
        ({"patch": 2}, "one size"),
        ({"patch": 2, "hidden": (8,), "objective": "denoising"}, "'vanilla' or 'masked'"),
        ({"patch": 3, "hidden": (8,)}, "a divisor"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Experiment(replace(SMALL, **change), small_set()).trainer().run()


def test_a_code_may_be_larger_than_the_input() -> None:
    experiment = Experiment(replace(SMALL, hidden=(100,)), small_set())
    assert experiment.codes(experiment.data.test.x).shape == (3, 30, 100)
    assert asdict(SMALL)["hidden"] == (6, 3)


def test_patches_need_an_image() -> None:
    with pytest.raises(ArgumentError, match="accepted: a set of images"):
        Experiment(replace(SMALL, patch=2, hidden=(8,)), small_set()._replace(image_shape=None))
