"""The linear probe against scikit-learn and by its properties; bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linattn.autoencoders import ProbeConfig, Split, choose_labelled, probe_accuracy
from linattn.errors import ArgumentError, DataError, ShapeError


def clusters(n: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    return 2 * torch.eye(3, 5)[y] + spread * torch.randn(n, 5, generator=generator), y


def test_it_does_as_well_as_logistic_regression_by_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the peer is scikit-learn's")
    (x, y), (test, test_y) = clusters(600, 0), clusters(2000, 1)
    config = ProbeConfig(epochs=200, batch=100, learning_rate=0.01)
    found = probe_accuracy(x[None], y, test[None], test_y, config, classes=3).item()
    peer = linear_model.LogisticRegression(C=1e6).fit(x.numpy(), y.numpy()).score(test.numpy(), test_y.numpy())
    assert found == pytest.approx(peer, abs=0.01)


@pytest.mark.parametrize("batch", [50, 200])
def test_probes_side_by_side_do_not_see_each_other(batch: int) -> None:
    (x, y), (test, test_y) = clusters(200, 0), clusters(300, 1)
    config = ProbeConfig(epochs=30, batch=batch, learning_rate=0.01)
    codes, tests = torch.stack([x, x.flip(-1), 3 * x]), torch.stack([test, test.flip(-1), 3 * test])
    together = probe_accuracy(codes, y, tests, test_y, config, classes=3, seed=5)
    assert together.shape == (3,)
    # The first probe begins with the same weights when it is alone.
    alone = probe_accuracy(codes[:1], y, tests[:1], test_y, config, classes=3, seed=5)
    assert together[0].item() == pytest.approx(alone.item(), abs=1e-12)


def test_labels_that_the_codes_do_not_hold_cannot_be_read() -> None:
    x, y = clusters(400, 0)
    shuffled = y[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    test, _ = clusters(3000, 2)
    test_y = torch.randint(3, (3000,), generator=torch.Generator().manual_seed(3))
    found = probe_accuracy(x[None], shuffled, test[None], test_y, ProbeConfig(epochs=20), classes=3).item()
    assert abs(found - 1 / 3) < 0.05


def test_the_codes_stay_as_they_are_and_no_gradient_reaches_them() -> None:
    x, y = clusters(50, 0)
    codes = x[None].clone().requires_grad_()
    probe_accuracy(codes.detach(), y, x[None], y, ProbeConfig(epochs=2), classes=3)
    assert codes.grad is None
    assert torch.equal(codes.detach()[0], x)


def test_labelled_samples_are_drawn_by_the_seed() -> None:
    split = Split(torch.zeros(100, 2), torch.arange(100))
    first, again, other = (choose_labelled(split, 20, seed) for seed in (0, 0, 1))
    assert len(first.unique()) == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(choose_labelled(split, None, 0).sort().values, torch.arange(100))
    with pytest.raises(DataError, match="101 labelled samples were asked for; accepted: at most 100"):
        choose_labelled(split, 101, 0)
    with pytest.raises(DataError, match="no labels"):
        choose_labelled(Split(torch.zeros(100, 2), torch.empty(0)), 10, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.empty(0, dtype=torch.int64)}, DataError, "the codes have no labels"),
        ({"test_y": torch.empty(0, dtype=torch.int64)}, DataError, "the test codes have no labels"),
        ({"y": torch.zeros(4, dtype=torch.int64)}, ShapeError, r"labels of shape \[4\]; accepted: \[6\]"),
        ({"y": torch.full((6,), 3)}, DataError, "reach from 3 to 3; accepted: 0 to 2"),
        ({"y": torch.full((6,), -1)}, DataError, "reach from -1"),
        ({"codes": torch.full((1, 6, 2), torch.nan)}, DataError, "the codes have entries that are NaN"),
        ({"codes": torch.zeros(6, 2)}, ShapeError, r"accepted: \[R, n, k\]"),
        ({"test_codes": torch.zeros(1, 6, 3)}, ShapeError, r"\[1, 6, 2\] and \[1, 6, 3\]"),
    ],
)
def test_bad_codes_and_labels(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(6, dtype=torch.int64)
    given = {"codes": torch.zeros(1, 6, 2), "y": zeros, "test_codes": torch.zeros(1, 6, 2), "test_y": zeros, **change}
    with pytest.raises(error, match=message):
        probe_accuracy(*given.values(), ProbeConfig(), classes=3)


@pytest.mark.parametrize("name", ["labels", "epochs", "batch", "learning_rate"])
def test_bad_settings(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"the probe cannot be trained; given: {name}=0"):
        ProbeConfig(**{name: 0})
