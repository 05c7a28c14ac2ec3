"""Principal components and linear autoencoders, plain and with weight decay: theory, peers, and where training ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from linattn.autoencoders import (
    Experiment,
    SampleSet,
    Settings,
    Split,
    first_order_residuals,
    load_set,
    orthonormality_defect,
    principal_angles,
    principal_components,
    shrunk_singular_values,
)
from linattn.bench.studies.networks import decay as decay_study
from linattn.bench.studies.networks.decay import Recipe
from linattn.errors import ArgumentError, ShapeError


def draw(n: int, F: int, seed: int = 0) -> Tensor:
    """Centred samples with variances that differ, along random directions."""
    generator = torch.Generator().manual_seed(seed)
    scales = 1.4 ** -torch.arange(F, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(F, F, generator=generator, dtype=torch.float64))[0]
    x = 3 * torch.randn(n, F, generator=generator, dtype=torch.float64) * scales @ rotation
    return x - x.mean(0)


@given(n=st.integers(2, 40), F=st.integers(1, 12), seed=st.integers(0, 5), data=st.data())
def test_components_satisfy_both_conditions_and_leave_the_smallest_variances(
    n: int, F: int, seed: int, data: st.DataObject
) -> None:
    x = draw(n, F, seed)
    k = data.draw(st.integers(1, min(F, n - 1)))
    found = principal_components(x + 5, k)
    torch.testing.assert_close(found.mean, torch.full((F,), 5.0, dtype=torch.float64))
    torch.testing.assert_close(found.directions.mT @ found.directions, torch.eye(k, dtype=torch.float64))
    assert max(first_order_residuals(found.directions.mT, found.directions, x)) < 1e-10
    loss = (x - x @ found.directions @ found.directions.mT).square().sum(1).mean()
    torch.testing.assert_close(loss, found.variances[k:].sum(), atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(
        found.variances,
        torch.linalg.svdvals(x)
        .square()
        .new_zeros(F)
        .copy_(torch.cat([torch.linalg.svdvals(x).square() / n, torch.zeros(max(0, F - n), dtype=torch.float64)])[:F]),
        atol=1e-9,
        rtol=1e-7,
    )


def test_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="the peer is scikit-learn's")
    x = draw(300, 10)
    peer = decomposition.PCA(4, svd_solver="full").fit(x.numpy())
    found = principal_components(x, 4)
    assert principal_angles(found.directions, torch.from_numpy(peer.components_.T.copy())).max() < 1e-6
    torch.testing.assert_close(found.variances[:4] * 300 / 299, torch.from_numpy(peer.explained_variance_))


def test_the_conditions_are_the_gradient() -> None:
    """dL/dW2 = -2 (I - W2 W1) S W1^T and dL/dW1 = -2 W2^T (I - W2 W1) S, by autograd."""
    x = draw(50, 6)
    W1, W2 = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 6), (6, 3)))
    (x - x @ W1.mT @ W2.mT).square().sum(1).mean().backward()
    S = x.mT @ x / len(x)
    with torch.no_grad():
        torch.testing.assert_close(W2.grad, -2 * (S - W2 @ W1 @ S) @ W1.mT)
        torch.testing.assert_close(W1.grad, -2 * W2.mT @ (S - W2 @ W1 @ S))
        first, second = first_order_residuals(W1, W2, x)
        assert first == pytest.approx((W2.grad.norm() / 2 / (S @ W1.mT).norm()).item())
        assert second == pytest.approx((W1.grad.norm() / 2 / (W2.mT @ S).norm()).item())


@given(seed=st.integers(0, 20), k=st.integers(1, 4), angle=st.floats(0, 90))
def test_angles_between_spaces_turned_by_a_known_angle(seed: int, k: int, angle: float) -> None:
    basis = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    turned = basis[:, :k].clone()
    turned[:, 0] = math.cos(math.radians(angle)) * basis[:, 0] + math.sin(math.radians(angle)) * basis[:, 8]
    mixed = turned @ (torch.randn(k, k, dtype=torch.float64) + 3 * torch.eye(k, dtype=torch.float64))
    expected = torch.zeros(k, dtype=torch.float64)
    expected[-1] = angle
    torch.testing.assert_close(principal_angles(basis[:, :k], mixed), expected, atol=1e-5, rtol=0)


def course(k: int) -> tuple[Tensor, Tensor, float, float]:
    """The course's linear autoencoder on the synthetic set: decoder, samples, its loss and the bound of PCA."""
    data = load_set("synthetic")
    unlabelled = [Split(split.x, torch.empty(0, dtype=torch.int64)) for split in data[1:4]]
    settings = Settings(hidden=(k,), activation="identity", batch=100, validate_every=10)
    experiment = Experiment(settings, SampleSet("synthetic", *unlabelled, None))
    experiment.trainer().run()
    model, x = experiment.models.member(0), data.train.x
    decoder = model.decoder[0].weight.detach()
    return decoder, x, model.loss(x).item(), principal_components(x, k).variances[k:].sum().item()


@pytest.mark.slow
def test_equal_variances_have_one_loss_and_no_directions() -> None:
    """At k = 5 of 20 equal variances the loss agrees while the angle says nothing; at k = 20 both agree."""
    decoder, x, loss, bound = course(5)
    assert bound == pytest.approx(228, abs=3)
    assert bound <= loss < 1.02 * bound
    assert principal_angles(decoder, principal_components(x, 5).directions).max() > 45
    decoder, x, loss, bound = course(20)
    assert bound == pytest.approx(79.8, abs=1)
    assert bound <= loss < 1.02 * bound
    assert principal_angles(decoder, principal_components(x, 20).directions).max() < 3


# ---- Weight decay ---------------------------------------------------------------------------------------------------


def optimum(x: Tensor, k: int, decay: float) -> tuple[Tensor, Tensor]:
    """The regularised loss minimised in float64 from all samples at once."""
    S, F = x.mT @ x / len(x), x.shape[1]
    W1, W2 = (torch.randn(*shape, dtype=torch.float64).mul(0.3).requires_grad_() for shape in ((k, F), (F, k)))
    eye = torch.eye(F, dtype=torch.float64)
    # Each round forgets the curvature it has gathered, which rounding spoils close to the optimum.
    for _ in range(5):
        optimizer = torch.optim.LBFGS(
            [W1, W2], max_iter=300, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def loss(optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            rest = eye - W2 @ W1
            value = (rest @ S * rest).sum() + decay * (W1.square().sum() + W2.square().sum())
            value.backward()
            return value

        optimizer.step(loss)
    return W1.detach(), W2.detach()


@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
def test_singular_values_at_the_optimum_are_those_of_theory(decay: float) -> None:
    x = draw(100, 7)
    W1, W2 = optimum(x, 3, decay)
    theory = shrunk_singular_values(principal_components(x, 3).variances[:3], decay)
    for weights in (W1, W2):
        torch.testing.assert_close(torch.linalg.svdvals(weights), theory, atol=5e-8, rtol=0)
    torch.testing.assert_close(W1, W2.mT, atol=1e-6, rtol=0)
    expected = ((theory.square() - 1).square().mean().sqrt()).item()
    assert orthonormality_defect(W2) == pytest.approx(expected, abs=1e-6)


def test_directions_narrower_than_the_decay_vanish() -> None:
    assert shrunk_singular_values(torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64), 1.0).tolist() == [
        0.75**0.5,
        0.0,
        0.0,
    ]


def test_pinned_singular_values_and_what_the_wrong_decay_leaves() -> None:
    """Single-sample SGD with nn.MSELoss: .983 .963 .933 with decay 2 lambda / m, .857 .642 .00003 with 2 lambda."""
    x = decay_study.samples(seed=0)
    S = x.mT @ x / len(x)
    torch.testing.assert_close(torch.linalg.eigvalsh(S).flip(0), torch.tensor(decay_study.VARIANCES, dtype=S.dtype))
    recipes = [Recipe("right", "mean", 0.6 / 8), Recipe("summed", "sum", 0.6), Recipe("wrong", "mean", 0.6)]
    right, summed, wrong = decay_study.train(x, recipes, epochs=40, seed=0)
    expected = torch.tensor([0.983, 0.963, 0.933], dtype=torch.float64)
    for values in right.singular_values:
        torch.testing.assert_close(values, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(right.decoder, summed.decoder, atol=1e-9, rtol=0)
    collapsed = torch.tensor([0.857, 0.642, 0.00003], dtype=torch.float64)
    torch.testing.assert_close(wrong.singular_values[1], collapsed, atol=0.01, rtol=0)
    assert orthonormality_defect(right.decoder) < 0.15


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_step_is_the_gradient_of_the_regularised_loss(reduction: str) -> None:
    x, decay = draw(1, 5), 0.2
    x += 1
    weights = [torch.randn(2, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]
    m = 5 if reduction == "mean" else 1
    ours = [nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.SGD(ours, lr=0.1 * m, weight_decay=2 * decay / m)
    nn.MSELoss(reduction=reduction)(ours[1] @ (ours[0] @ x[0]), x[0]).backward()
    optimizer.step()
    W1, W2 = (w.clone().requires_grad_() for w in weights)
    ((x[0] - W2 @ (W1 @ x[0])).square().sum() + decay * (W1.square().sum() + W2.square().sum())).backward()
    torch.testing.assert_close(ours[0].detach(), weights[0] - 0.1 * W1.grad)
    torch.testing.assert_close(ours[1].detach(), weights[1] - 0.1 * W2.grad)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: principal_components(torch.ones(5), 1), ShapeError, r"shape; given: \[5\]"),
        (lambda: principal_components(torch.ones(5, 3), 0), ArgumentError, "given: k=0; accepted: 1 to 3"),
        (lambda: principal_components(torch.ones(5, 3), 4), ArgumentError, "k=4"),
        (lambda: first_order_residuals(torch.ones(2, 3), torch.ones(2, 3), torch.ones(5, 3)), ShapeError, "decoder"),
        (lambda: principal_angles(torch.ones(3, 2), torch.ones(4, 2)), ShapeError, r"\[3, 2\] and \[4, 2\]"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
