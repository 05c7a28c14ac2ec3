"""Deeper can be worse, even on the training set: plain and residual networks of 20 and 56 layers.

A plain network of 56 layers could do whatever one of 20 does, by letting 36 layers pass on their input. It does not:
its training error stays higher, so this is not overfitting but optimisation. A residual block computes relu(f(x) + x)
and passes its input on by f = 0, which is where small weights start. Same layers, same data, same steps:

    plain:     x_(l+1) = relu(f(x_l))        residual:  x_(l+1) = relu(f(x_l) + x_l)

f is convolution, BatchNorm, relu, convolution, BatchNorm. Source: He, Zhang, Ren and Sun 2016, "Deep residual learning
for image recognition", there on CIFAR-10; here on 8 x 8 digits with 4 to 16 channels.
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
from torch.nn import functional as F

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.bench.studies.networks.convnets import ConvNet
from linattn.bench.studies.networks.digits import Digits, load_digits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

DEPTHS = (20, 56)
TRAINING, BATCH = 1500, 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4


@dataclass(frozen=True)
class Curve:
    """One network: mean loss (nats) and share wrong on the training batches of each epoch; share wrong held out."""

    depth: int
    residual: bool
    parameters: int
    losses: list[float]
    errors: list[float]
    held_out_error: float

    @property
    def name(self) -> str:
        """Return kind and depth, as in tables and legends."""
        return f"{'residual' if self.residual else 'plain'} {self.depth}"


def train(depth: int, residual: bool, digits: Digits, epochs: int, seed: int, width: int = 4) -> Curve:
    """Train by SGD with momentum on the first 1,500 digits; the order of the batches is the same for every network."""
    torch.manual_seed(seed)
    net = ConvNet(depth, width=width, residual=residual)
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    order = torch.Generator().manual_seed(seed)
    losses, errors = [], []
    for _ in range(epochs):
        loss_sum, wrong, batches = 0.0, 0, torch.split(torch.randperm(TRAINING, generator=order), BATCH)
        for batch in batches:
            logits, labels = net(digits.images[batch]), digits.labels[batch]
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item()
            wrong += int((logits.argmax(1) != labels).sum())
        losses.append(loss_sum / len(batches))
        errors.append(wrong / TRAINING)
    net.eval()
    with torch.no_grad():
        held_out = net(digits.images[TRAINING:]).argmax(1) != digits.labels[TRAINING:]
    parameters = sum(p.numel() for p in net.parameters())
    return Curve(depth, residual, parameters, losses, errors, held_out.double().mean().item())


def claims_of(curves: Sequence[Curve]) -> list[study.Claim]:
    """Claim that the deeper plain network trains worse, the deeper residual one does not."""
    error = {curve.name: 100 * curve.errors[-1] for curve in curves}
    (plain, plain_deep), (residual, residual_deep) = (
        (error[f"{kind} {DEPTHS[0]}"], error[f"{kind} {DEPTHS[1]}"]) for kind in ("plain", "residual")
    )
    return [
        study.Claim(
            f"training error plain {DEPTHS[1]} minus plain {DEPTHS[0]}, points", plain_deep - plain, ">=", 10.0
        ),
        study.Claim(
            f"training error residual {DEPTHS[1]} minus residual {DEPTHS[0]}, points",
            residual_deep - residual,
            "<=",
            2.0,
        ),
        study.Claim(f"training error residual {DEPTHS[1]}, %", residual_deep, "<=", 3.0),
    ]


def draw(curves: Sequence[Curve]) -> Figure:
    """Draw training error and loss over the epochs: colour tells the kind, line style the depth."""
    figure = figures.new_figure(10.5, 4.2)
    left, right = figure.subplots(1, 2)
    for curve in curves:
        style = {
            "color": figures.BLUE if curve.residual else figures.VERMILION,
            "linestyle": "-" if curve.depth == DEPTHS[-1] else "--",
            "label": f"{curve.name} layers",
        }
        epochs = range(1, len(curve.errors) + 1)
        left.plot(epochs, [100 * share for share in curve.errors], **style)
        right.plot(epochs, curve.losses, **style)
    left.set(title="Error on the training set", ylabel="training images misread (%)", ylim=(-2, 95))
    right.set(title="Loss on the training set", ylabel="mean cross entropy (nats)", yscale="log")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figures.add_grid(axes)
    right.legend(loc="lower left")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study depth`."""
    study.add_common_arguments(parser, "depth")
    parser.add_argument("--epochs", type=whole, default=15, help="of 15 batches each (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train all four, print, draw."""
    study.require_matplotlib()
    digits = load_digits()
    curves = []
    for residual in (False, True):
        for depth in DEPTHS:
            curves.append(train(depth, residual, digits, args.epochs, args.seed))
            print(f"{curves[-1].name}: training error {100 * curves[-1].errors[-1]:.1f} %", file=sys.stderr, flush=True)
    text = text_table(
        ("network", "parameters", "training loss", "training error (%)", "held-out error (%)"),
        [(c.name, c.parameters, c.losses[-1], 100 * c.errors[-1], 100 * c.held_out_error) for c in curves],
    )
    return study.finish("depth", text, claims_of(curves), draw(curves), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "depth", *sys.argv[1:]]))
