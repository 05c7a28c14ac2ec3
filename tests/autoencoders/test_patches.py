"""The attention autoencoder: patches, what is hidden and what may see it, learning, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linattn.autoencoders import Experiment, PatchAutoencoder, ProbeConfig, Settings, load_set
from linattn.errors import ArgumentError, DtypeError, ShapeError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.integers(1, 3), n=st.integers(1, 3))
def test_patches_and_back(rows: int, columns: int, patch: int, n: int) -> None:
    model = PatchAutoencoder((rows * patch, columns * patch), patch, 8, heads=2)
    x = torch.randn(n, model.input_size)
    patches = model._patches(x)
    assert patches.shape == (n, rows * columns, patch * patch)
    assert torch.equal(model._unpatch(patches), x)
    corner = x.view(n, rows * patch, columns * patch)[:, :patch, :patch].flatten(1)
    assert torch.equal(patches[:, 0], corner)


@pytest.mark.parametrize("kernel", ["quadratic", "softmax", "elu+1"])
def test_hidden_pixels_do_not_reach_the_reconstruction(kernel: str) -> None:
    model = PatchAutoencoder((8, 8), 2, 16, kernel=kernel, probability=0.75)
    x = torch.rand(5, 64)
    filled, hidden = model.inpaint(x, seeded(0))
    assert hidden.view(5, 8, 8)[:, ::2, ::2].sum((1, 2)).tolist() == [12] * 5
    changed = torch.where(hidden, torch.rand(5, 64), x)
    torch.testing.assert_close(model.inpaint(changed, seeded(0))[0], filled)
    seen = torch.where(hidden, x, torch.rand(5, 64))
    assert not torch.allclose(model.inpaint(seen, seeded(0))[0], filled)
    assert not torch.equal(model.inpaint(x, seeded(1))[1], hidden)
    expected = (filled - x).square().sum(1).mean()
    torch.testing.assert_close(model.loss(x, generator=seeded(0)), expected)


def test_with_nothing_hidden_the_loss_is_that_of_the_reconstruction() -> None:
    model = PatchAutoencoder((8, 8), 4, 16, probability=0.0)
    x = torch.rand(3, 64)
    torch.testing.assert_close(model.loss(x, "mean"), (model(x) - x).square().mean())
    assert model.encode(x.view(3, 1, 64)).shape == (3, 1, 16)


def test_images_do_not_see_each_other() -> None:
    model = PatchAutoencoder((8, 8), 2, 16).double()
    x = torch.rand(4, 64, dtype=torch.float64)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]))
    torch.testing.assert_close(model.encode(x)[2:3], model.encode(x[2:3]))


def test_position_matters() -> None:
    model = PatchAutoencoder((4, 4), 2, 16, layers=1)
    with torch.no_grad():
        model.position.normal_()
    patches = torch.rand(1, 4, 4)
    a, b = (model.encode(model._unpatch(patches[:, order])) for order in ([0, 1, 2, 3], [3, 2, 1, 0]))
    assert not torch.allclose(a, b, atol=1e-4)


def test_it_learns_to_fill_in_digits() -> None:
    pytest.importorskip("sklearn", reason="the handwritten digits need scikit-learn")
    data = load_set("digits")
    settings = Settings(
        objective="masked", mask=0.5, patch=2, hidden=(32,), lr=3e-3, epochs=4, batch=50, probe=ProbeConfig(200, 10)
    )
    trainer = Experiment(settings, data).trainer()
    trainer.run()
    first, last = trainer.history[0], trainer.history[-1]
    # The mean digit, which takes no looking at the image, is worth the variance of the set.
    mean_digit = (data.valid.x - data.train.x.mean(0)).square().sum(1).mean().item()
    assert last.validation_loss < 0.9 * mean_digit < first.validation_loss


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PatchAutoencoder((8, 8), 3, 16), ArgumentError, "patch=3 .* a divisor"),
        (lambda: PatchAutoencoder((8, 8), 0, 16), ArgumentError, "patch=0"),
        (
            lambda: PatchAutoencoder((8, 8), 2, 16, probability=1.0),
            ArgumentError,
            r"given: 1\.0; accepted: .* \[0, 1\)",
        ),
        (lambda: PatchAutoencoder((8, 8), 2, 16, kernel="sofmax"), ArgumentError, "Did you mean 'softmax'"),
        (
            lambda: PatchAutoencoder((8, 8), 2, 16)(torch.ones(2, 63)),
            ShapeError,
            r"given: \[2, 63\]; accepted: \[..., 64\]",
        ),
        (lambda: PatchAutoencoder((8, 8), 2, 16)(torch.ones(2, 64).long()), DtypeError, "int64"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
