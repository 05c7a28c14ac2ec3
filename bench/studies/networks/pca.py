"""Test what a linear autoencoder learns: the space of the principal components, but not the components.

With rows as samples, centred, S = X^T X / n, W1 [k, F] and W2 [F, k], the loss L = |X - X W1^T W2^T|^2 / n is
stationary where

    (I - W2 W1) S W1^T = 0        W2^T (I - W2 W1) S = 0

Principal components (W1^T = W2 = the k directions of largest variance) satisfy both, and no linear code does better.
The study evaluates both conditions there, at random weights, and where training ends; and it compares the space that
was learned with that of scikit-learn's PCA by principal angles. These mean something only where the k-th variance is
well above the next one: of 20 equal variances any 5 directions do.

Source: Baldi and Hornik 1989, "Neural networks and principal component analysis".
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.autoencoders import (
    Autoencoder,
    first_order_residuals,
    load_set,
    principal_angles,
    principal_components,
    synthetic_set,
)
from linattn.bench.studies.common import study
from linattn.errors import MissingExtraError
from linattn.training.trainer import Trainer, TrainingConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

BATCH = 200
CASES = (("synthetic", 5), ("synthetic", 20), ("digits", 10))


@dataclass(frozen=True)
class FitOutcome:
    """One set and size: variances, losses, both residuals at three places, and the principal angles (degrees)."""

    name: str
    k: int
    variances: Tensor
    bound: float
    loss: float
    residuals: dict[str, tuple[float, float]]
    angles: Tensor


def load_centred(name: str, seed: int) -> Tensor:
    """Load the training samples of a set with their mean taken off, float64."""
    if name == "synthetic":
        x = synthetic_set(generator=torch.Generator().manual_seed(seed)).train.x.double()
    else:
        x = load_set(name, seed=seed).train.x.double()
    return x - x.mean(0)


def train(x: Tensor, k: int, steps: int, seed: int) -> Autoencoder:
    """Train a linear autoencoder by Adam, with a rate that falls to 0 so that no noise of the batches is left."""
    torch.manual_seed(seed)
    model = Autoencoder(x.shape[1], k, "identity", dtype=torch.float64)
    generator = torch.Generator()

    def loss(step: int) -> Tensor:
        batch = torch.randint(len(x), (BATCH,), generator=generator.manual_seed(seed * steps + step))
        return model.loss(x[batch])

    config = TrainingConfig(
        steps=steps,
        learning_rate=0.01,
        warmup=0.0,
        final_learning_rate=0.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip=None,
        validate_every=steps,
    )
    Trainer(model, loss, lambda: model.loss(x).item(), config).run()
    return model


@torch.no_grad()
def outcome_of(name: str, k: int, steps: int, seed: int) -> FitOutcome:
    """Train, and hold what was found against scikit-learn's principal components."""
    try:
        from sklearn import decomposition
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "studies", "comparing with its PCA") from error
    x = load_centred(name, seed)
    found = principal_components(x, k)
    peer = torch.from_numpy(decomposition.PCA(k, svd_solver="full").fit(x.numpy()).components_)
    with torch.enable_grad():
        model = train(x, k, steps, seed)
    encoder, decoder = model.encoder[0].weight, model.decoder[0].weight
    assert isinstance(encoder, Tensor)
    assert isinstance(decoder, Tensor)
    start = Autoencoder(x.shape[1], k, "identity", dtype=torch.float64)
    first, last = start.encoder[0].weight, start.decoder[0].weight
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    return FitOutcome(
        name,
        k,
        found.variances,
        found.variances[k:].sum().item(),
        model.loss(x).item(),
        {
            "principal components": first_order_residuals(found.directions.mT, found.directions, x),
            "trained": first_order_residuals(encoder, decoder, x),
            "random weights": first_order_residuals(first, last, x),
        },
        principal_angles(decoder, peer.mT),
    )


def claims_of(outcomes: Sequence[FitOutcome]) -> list[study.Claim]:
    """Claim conditions, losses and angles, and the case in which angles say nothing."""
    claims = []
    for o in outcomes:
        what = f"{o.name}, k = {o.k}:"
        claims += [
            study.Claim(
                f"{what} both conditions at the components", max(o.residuals["principal components"]), "<", 1e-12
            ),
            study.Claim(f"{what} both conditions where training ends", max(o.residuals["trained"]), "<", 0.02),
            study.Claim(f"{what} loss over the PCA loss", o.loss / o.bound, "<", 1.02),
        ]
        gap = (o.variances[o.k - 1] / o.variances[o.k]).item()
        if gap > 1.05:
            claims.append(study.Claim(f"{what} largest angle to PCA, degrees", o.angles.max().item(), "<", 5.0))
        else:
            claims.append(
                study.Claim(f"{what} largest angle to PCA among equal variances", o.angles.max().item(), ">", 10.0)
            )
    return claims


def draw(outcomes: Sequence[FitOutcome]) -> Figure:
    """Draw above the variances, and which of them the code keeps; below the angles to PCA."""
    figure = figures.new_figure(3.6 * len(outcomes), 6)
    grid = figure.subplots(2, len(outcomes), squeeze=False)
    for o, (above, below) in zip(outcomes, grid.T, strict=True):
        numbers = range(1, len(o.variances) + 1)
        above.plot(numbers, o.variances.clamp_min(1e-4).tolist(), color=figures.GREY, marker=".", label="variance")
        above.axvline(o.k + 0.5, color=figures.VERMILION, linestyle="--", label=f"k = {o.k}")
        above.set(title=f"{o.name}: loss {o.loss:.4g}, PCA {o.bound:.4g}", xlabel="principal direction", yscale="log")
        below.bar(range(1, o.k + 1), o.angles.tolist(), color=figures.BLUE)
        below.set(xlabel="principal angle", ylim=(0, 95 if o.angles.max() > 10 else 5))
        figures.add_grid(above)
        figures.add_grid(below, axis="y")
        above.legend()
    grid[0][0].set_ylabel("variance of the samples")
    grid[1][0].set_ylabel("angle between learned space and PCA (°)")
    figure.suptitle("A trained linear autoencoder beside principal components")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study pca`."""
    study.add_common_arguments(parser, "pca")
    parser.add_argument("--steps", type=whole, default=3000, help="of training (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run all cases, print, draw."""
    study.require_matplotlib()
    outcomes = [outcome_of(name, k, args.steps, args.seed) for name, k in CASES]
    header = ("set", "k", "loss", "PCA loss", "largest angle", "at", "condition 1", "condition 2")
    rows = [
        (o.name, o.k, o.loss, o.bound, o.angles.max().item(), place, *residuals)
        for o in outcomes
        for place, residuals in o.residuals.items()
    ]
    return study.finish("pca", text_table(header, rows), claims_of(outcomes), draw(outcomes), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "pca", *sys.argv[1:]]))
