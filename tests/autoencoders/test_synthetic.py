"""The synthetic set: spectrum, labels, splits; and a linear autoencoder that reaches the PCA bound on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linattn.autoencoders import Autoencoder, SyntheticSet, synthetic_set
from linattn.errors import ArgumentError


def draw(seed: int = 0, **options: object) -> SyntheticSet:
    return synthetic_set(generator=torch.Generator().manual_seed(seed), **options)


def pca_bound(x: Tensor, k: int) -> float:
    """The variance that the best k-dimensional linear code loses."""
    return torch.linalg.eigvalsh(torch.cov(x.T.double())).flip(0)[k:].sum().item()


@pytest.mark.parametrize(("scale", "bounds"), [(10.0, {5: 230, 20: 80, 100: 0}), (100.0, {5: 1580, 20: 80, 100: 0})])
def test_the_bounds_of_the_full_set(scale: float, bounds: dict[int, float]) -> None:
    data = draw(variance_scale=scale)
    x = torch.cat([split.x for split in data[:3]])
    assert x.shape == (20_000, 100)
    for k, expected in bounds.items():
        assert pca_bound(x, k) == pytest.approx(expected, rel=0.03, abs=1e-6)


def test_splits_labels_and_rotation() -> None:
    data = draw(samples=1000, input_size=30, signal_size=4, variance_scale=25.0)
    assert [split.x.shape for split in data[:3]] == [(700, 30), (200, 30), (100, 30)]
    identity = data.rotation @ data.rotation.T
    torch.testing.assert_close(identity, torch.eye(30), atol=1e-6, rtol=0)
    # The rotation must mix the axes, else there is nothing to find.
    assert data.rotation.abs().max() < 0.9
    for split in data[:3]:
        aligned = split.x @ data.rotation.T
        assert torch.equal(split.y == 1, aligned[:, :4].sum(1) > 0)
        assert 0.35 < split.y.double().mean() < 0.65
    variance = (data.train.x @ data.rotation.T).var(0)
    assert variance[:4].min() > 20 > 2 > variance[4:].max()


def test_one_seed_one_set() -> None:
    first, second, other = draw(3, samples=50), draw(3, samples=50), draw(4, samples=50)
    assert all(torch.equal(a, b) for a, b in zip(first.train, second.train, strict=True))
    assert not torch.equal(first.train.x, other.train.x)
    assert not torch.equal(first.rotation, other.rotation)


def test_a_linear_autoencoder_reaches_the_pca_bound_and_its_code_keeps_the_label() -> None:
    torch.manual_seed(0)
    train, valid, *_ = draw(samples=3000, input_size=20, signal_size=4, variance_scale=10.0)
    model = Autoencoder(20, 4, "identity")
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):
        for batch in train.x[torch.randperm(len(train.x))].split(100):
            loss = model.loss(batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        assert pca_bound(train.x, 4) * 0.999 <= model.loss(train.x).item() <= pca_bound(train.x, 4) * 1.03
        code, target = model.encode(valid.x), 2.0 * valid.y - 1
        design = torch.cat([code, torch.ones(len(code), 1)], 1)
        weights = torch.linalg.lstsq(design, target[:, None]).solution
        assert ((design @ weights).squeeze(1) > 0).eq(valid.y == 1).double().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is no count; given: 0; accepted: an int of at least 1"),
        ({"input_size": 2.0}, "input_size .* 2.0"),
        ({"input_size": 10}, "signal_size .*; given: 20; accepted: at most input_size = 10"),
        ({"signal_size": 0}, "signal_size"),
        ({"variance_scale": 0.0}, "variance_scale"),
        ({"variance_scale": float("nan")}, "variance_scale"),
        ({"fractions": (0.7, 0.3)}, "three positive numbers"),
        ({"fractions": (0.7, 0.2, 0.2)}, "sum to 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "three positive numbers"),
        ({"samples": 3}, "leave a split empty"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        draw(**options)
