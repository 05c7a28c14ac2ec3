"""Weight decay makes a linear autoencoder find the principal components themselves, nearly.

    L = |x - W2 W1 x|^2 + lambda (|W1|^2 + |W2|^2)        mean over samples x

Without decay any invertible A gives the same loss for A W1 and W2 A^-1. Decay prefers the smallest weights: W1 = W2^T,
the k principal directions times singular values sqrt(max(0, 1 - lambda / sigma_i^2)). For small lambda the columns of
W2 are nearly orthonormal. Found here as in a first course: two layers without biases, plain SGD over single samples,
PyTorch's `weight_decay`, which adds weight_decay * w to the gradient:

    loss summed over the m entries of a sample    weight_decay = 2 lambda
    nn.MSELoss, which averages over them          weight_decay = 2 lambda / m

With 2 lambda for nn.MSELoss decay is m times what was meant, and directions vanish. Source: Kunin et al. 2019, "Loss
landscapes of regularized linear autoencoders".
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor, nn

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.autoencoders import orthonormality_defect, principal_angles, shrunk_singular_values
from linattn.bench.studies.common import study

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

# Variances of the samples: three wide directions, well apart, and five narrow ones.
VARIANCES = (8.9, 4.13, 2.316, 0.4, 0.3, 0.2, 0.1, 0.05)
K = 3
SAMPLES = 200
DECAYS = (0.0, 0.1, 0.3, 1.0, 2.0)
SHOWN = 0.3
RATE = 0.003


class Recipe(NamedTuple):
    """The training of one autoencoder: the loss, and what PyTorch is given as weight decay."""

    name: str
    reduction: Literal["sum", "mean"]
    weight_decay: float


class TrainedWeights(NamedTuple):
    """Weights W1 `[k, F]` and W2 `[F, k]` where training ended."""

    encoder: Tensor
    decoder: Tensor

    @property
    def singular_values(self) -> tuple[Tensor, Tensor]:
        """Return the singular values of W1 and of W2, largest first."""
        return torch.linalg.svdvals(self.encoder), torch.linalg.svdvals(self.decoder)


def samples(seed: int) -> Tensor:
    """Draw samples `[200, 8]`, float64: mean 0 and exactly the variances above, along random directions."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(SAMPLES, len(VARIANCES), generator=generator, dtype=torch.float64)
    u = torch.linalg.qr(noise - noise.mean(0))[0]
    rotation = torch.linalg.qr(torch.randn(len(VARIANCES), len(VARIANCES), generator=generator, dtype=torch.float64))[0]
    scales = torch.tensor(VARIANCES, dtype=torch.float64).sqrt() * SAMPLES**0.5
    x: Tensor = (u * scales) @ rotation
    return x


def train(x: Tensor, recipes: Sequence[Recipe], epochs: int, seed: int) -> list[TrainedWeights]:
    """Train by SGD over single samples, one autoencoder a recipe, from the same weights and in the same order.

    The rate falls linearly to 0. A loss that is averaged over m entries gets a rate m times as large, so that all
    recipes take steps of one size.
    """
    torch.manual_seed(seed)
    m = x.shape[1]
    start = [nn.Linear(m, K, bias=False, dtype=x.dtype), nn.Linear(K, m, bias=False, dtype=x.dtype)]
    models, groups = [], []
    for recipe in recipes:
        encoder, decoder = (nn.Parameter(layer.weight.detach().clone()) for layer in start)
        models.append((encoder, decoder))
        rate = RATE * (m if recipe.reduction == "mean" else 1)
        groups.append({"params": [encoder, decoder], "weight_decay": recipe.weight_decay, "lr": rate})
    optimizer = torch.optim.SGD(groups, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (epochs * len(x)))
    losses = {reduction: nn.MSELoss(reduction=reduction) for reduction in ("sum", "mean")}
    for _ in range(epochs):
        for sample in x[torch.randperm(len(x))]:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=x.dtype)
            for recipe, (encoder, decoder) in zip(recipes, models, strict=True):
                total = total + losses[recipe.reduction](decoder @ (encoder @ sample), sample)
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return [TrainedWeights(encoder.detach(), decoder.detach()) for encoder, decoder in models]


def recipes_of() -> list[Recipe]:
    """Build the recipes: nn.MSELoss with the right decay for each lambda; for one lambda the summed loss too, and the
    mistake.
    """
    m = len(VARIANCES)
    right = [Recipe(f"lambda = {decay:g}", "mean", 2 * decay / m) for decay in DECAYS]
    return [
        *right,
        Recipe(f"lambda = {SHOWN:g}, summed loss", "sum", 2 * SHOWN),
        Recipe(f"lambda = {SHOWN:g}, MSELoss with decay 2 lambda", "mean", 2 * SHOWN),
    ]


def claims_of(found: dict[str, TrainedWeights]) -> list[study.Claim]:
    """Claim singular values, their equality, what the mistake does, and how orthonormal the columns are."""
    variances = torch.tensor(VARIANCES[:K], dtype=torch.float64)
    claims = []
    for decay in DECAYS[1:]:
        theory = shrunk_singular_values(variances, decay)
        worst = max((values - theory).abs().max().item() for values in found[f"lambda = {decay:g}"].singular_values)
        claims.append(study.Claim(f"lambda = {decay:g}: singular values of W1, W2 off theory", worst, "<", 0.03))
    shown = found[f"lambda = {SHOWN:g}"]
    summed = found[f"lambda = {SHOWN:g}, summed loss"]
    mistaken = found[f"lambda = {SHOWN:g}, MSELoss with decay 2 lambda"].singular_values[1]
    return [
        *claims,
        study.Claim("W1 and W2^T apart", (shown.encoder - shown.decoder.mT).abs().max().item(), "<", 0.02),
        study.Claim(
            "the summed loss with 2 lambda apart", (shown.decoder - summed.decoder).abs().max().item(), "<", 1e-9
        ),
        study.Claim("the mistake leaves of the third direction", mistaken[2].item(), "<", 0.01),
        study.Claim("defect of W2 at lambda = 0.1", orthonormality_defect(found["lambda = 0.1"].decoder), "<", 0.06),
        study.Claim("defect of W2 at lambda = 0", orthonormality_defect(found["lambda = 0"].decoder), ">", 0.3),
    ]


def draw(found: dict[str, TrainedWeights]) -> Figure:
    """Draw singular values over lambda with theory as lines; defect of W2's columns over lambda; the mistake."""
    figure = figures.new_figure(13, 4.2)
    left, middle, right = figure.subplots(1, 3)
    colours = (figures.BLUE, figures.ORANGE, figures.GREEN)
    variances = torch.tensor(VARIANCES[:K], dtype=torch.float64)
    decays = torch.logspace(-2, 1, 100, dtype=torch.float64)
    trained = [(decay, found[f"lambda = {decay:g}"]) for decay in DECAYS[1:]]
    for i, colour in enumerate(colours):
        left.plot(decays, [shrunk_singular_values(variances, d.item())[i].item() for d in decays], color=colour)
        for which, marker in ((0, "o"), (1, "x")):
            values = [one.singular_values[which][i].item() for _, one in trained]
            left.plot([decay for decay, _ in trained], values, marker, color=colour, markerfacecolor="none")
        left.annotate(f"σ² = {VARIANCES[i]:g}", (decays[0], 0.55 - 0.08 * i), color=colour)
    left.plot([], [], "o", color=figures.GREY, markerfacecolor="none", label="W1, trained")
    left.plot([], [], "x", color=figures.GREY, label="W2, trained")
    left.plot([], [], color=figures.GREY, label="√(1 - λ/σ²)")
    left.set(xscale="log", xlabel="λ", ylabel="singular value", title="Singular values")
    left.legend(loc="lower left")
    theory = [(1 - shrunk_singular_values(variances, d.item()) ** 2).square().mean().sqrt().item() for d in decays]
    middle.plot(decays, theory, color=figures.GREY, label="theory")
    middle.plot(
        [d for d, _ in trained],
        [orthonormality_defect(one.decoder) for _, one in trained],
        "x",
        color=figures.BLUE,
        label="trained",
    )
    middle.axhline(
        orthonormality_defect(found["lambda = 0"].decoder),
        color=figures.VERMILION,
        linestyle="--",
        label="λ = 0, trained",
    )
    middle.set(
        xscale="log", yscale="log", xlabel="λ", ylabel="|W2ᵀW2 - I| / √k", title="How far W2 is from orthonormal"
    )
    middle.legend()
    places = list(range(1, K + 1))
    bars = {
        "theory": (shrunk_singular_values(variances, SHOWN), figures.GREY),
        "weight_decay = 2λ/m": (found[f"lambda = {SHOWN:g}"].singular_values[1], figures.BLUE),
        "weight_decay = 2λ": (
            found[f"lambda = {SHOWN:g}, MSELoss with decay 2 lambda"].singular_values[1],
            figures.VERMILION,
        ),
    }
    for shift, (name, (heights, colour)) in zip((-0.27, 0, 0.27), bars.items(), strict=True):
        right.bar([place + shift for place in places], heights.tolist(), 0.25, color=colour, label=name)
    right.set(
        xlabel="number",
        ylabel="singular value of W2",
        ylim=(0, 1.35),
        title=f"nn.MSELoss, λ = {SHOWN:g}, m = {len(VARIANCES)}",
    )
    right.set_xticks(places)
    right.legend(loc="upper right")
    for axes in (left, middle, right):
        figures.add_grid(axes)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study decay`."""
    study.add_common_arguments(parser, "decay")
    parser.add_argument("--epochs", type=whole, default=200, help=f"of {SAMPLES} samples each (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train all recipes, print, draw."""
    study.require_matplotlib()
    x = samples(args.seed)
    recipes = recipes_of()
    found = dict(zip([r.name for r in recipes], train(x, recipes, args.epochs, args.seed), strict=True))
    directions = torch.linalg.svd(x, full_matrices=False)[2][:K].mT
    rows = []
    for recipe in recipes:
        one = found[recipe.name]
        values = [f"{value:.4f}" for value in one.singular_values[1].tolist()]
        angle = principal_angles(one.decoder, directions).max().item()
        rows.append((recipe.name, " ".join(values), orthonormality_defect(one.decoder), angle))
    header = ("trained with", "singular values of W2", "defect", "angle to PCA (degrees)")
    return study.finish("decay", text_table(header, rows), claims_of(found), draw(found), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "decay", *sys.argv[1:]]))
