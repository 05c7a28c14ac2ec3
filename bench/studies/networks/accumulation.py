"""Gradient accumulation: which normalisation survives it, and the loop that forgets `zero_grad()`.

The mean loss of 32 images is the mean of the losses of their micro-batches, so its gradient may be added up piece by
piece, if an image's logits do not depend on who else is in its batch. LayerNorm takes mean and variance over one image,
BatchNorm over the batch it is given:

    LayerNorm:  over channels and pixels of each image        BatchNorm:  over images and pixels for each channel

so under BatchNorm micro-batches of 1, 2, ... compute another function. `loss.backward()` adds to what is in `.grad`;
a loop that never calls `zero_grad()` steps along the sum of all gradients so far, w_(t+1) = w_t - lr sum_(s<=t) g_s.
That is momentum 1: nothing is ever forgotten, and it overshoots further and further.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.bench.studies.networks.convnets import ConvNet, Norm
from linattn.bench.studies.networks.digits import Digits, load_digits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

BATCH = 32
# Micro-batch size and number of micro-batches.
SPLITS = ((1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1))
NORMS: dict[str, Norm] = {"BatchNorm": "batch", "LayerNorm": "layer"}
DEPTH, WIDTH, STEP = 8, 8, 0.1
LOOP_RATE = 0.5


@dataclass(frozen=True)
class Difference:
    """A split against the whole batch: logits, gradient (relative norm), and logits after one step of SGD."""

    norm: str
    size: int
    count: int
    logits: float
    gradient: float
    logits_after: float


def compare(norm: str, digits: Digits, seed: int) -> list[Difference]:
    """Compare one batch of 32 in all splits, float64, training mode."""
    torch.manual_seed(seed)
    start = ConvNet(DEPTH, width=WIDTH, norm=NORMS[norm]).double()
    images, labels = digits.images[:BATCH], digits.labels[:BATCH]
    logits, gradient, after = _one_step(start, images, labels, BATCH)
    rows = []
    for size, count in SPLITS:
        split = _one_step(start, images, labels, size)
        rows.append(
            Difference(
                norm,
                size,
                count,
                (split[0] - logits).abs().max().item(),
                ((split[1] - gradient).norm() / gradient.norm()).item(),
                (split[2] - after).abs().max().item(),
            )
        )
    return rows


def _one_step(start: nn.Module, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute logits and gradient of the batch in micro-batches of `size`, and logits after an SGD step."""
    net = copy.deepcopy(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=STEP)
    logits = []
    for micro, its_labels in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        logits.append(net(micro))
        loss = F.cross_entropy(logits[-1], its_labels) * len(micro) / len(images)
        loss.backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    optimizer.step()
    with torch.no_grad():
        return torch.cat(logits).detach(), gradient, net(images)


def train(zero_grad: bool, digits: Digits, steps: int, seed: int) -> list[float]:
    """Train; return the losses of a loop with or without `zero_grad()`, on the same batches."""
    torch.manual_seed(seed)
    net = ConvNet(DEPTH, width=WIDTH, norm="layer").double()
    optimizer = torch.optim.SGD(net.parameters(), lr=LOOP_RATE)
    order = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(digits.labels), (BATCH,), generator=order)
        loss = F.cross_entropy(net(digits.images[batch]), digits.labels[batch])
        if zero_grad:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def means_of_tenths(losses: Sequence[float]) -> list[float]:
    """Compute means over ten equal parts of a curve; what is left over counts to the last."""
    part = max(1, len(losses) // 10)
    starts = range(0, part * min(10, len(losses)), part)
    pieces = [losses[start : start + part] for start in starts[:-1]] + [losses[starts[-1] :]]
    return [sum(piece) / len(piece) for piece in pieces]


def claims_of(rows: Sequence[Difference], losses: Sequence[Sequence[float]]) -> list[study.Claim]:
    """Claim that LayerNorm agrees to rounding in every split, BatchNorm in none; without zero_grad() the loss grows.

    Args:
        rows: differences of every split, under both normalisations.
        losses: of the loop with `zero_grad()` and of the one without.
    """
    layer = [row for row in rows if row.norm == "LayerNorm"]
    batch = [row for row in rows if row.norm == "BatchNorm" and row.count > 1]
    mended, broken = map(means_of_tenths, losses)
    first = losses[0][0]
    return [
        study.Claim(
            "LayerNorm: largest difference of logits over the splits", max(r.logits for r in layer), "<=", 1e-10
        ),
        study.Claim("LayerNorm: largest relative difference of gradients", max(r.gradient for r in layer), "<=", 1e-10),
        study.Claim("LayerNorm: logits after the step", max(r.logits_after for r in layer), "<=", 1e-10),
        study.Claim(
            "BatchNorm: smallest difference of logits over the true splits", min(r.logits for r in batch), ">=", 0.01
        ),
        study.Claim("BatchNorm: smallest relative difference of gradients", min(r.gradient for r in batch), ">=", 0.01),
        study.Claim("with zero_grad(): mean loss of the last tenth over the first loss", mended[-1] / first, "<=", 0.1),
        study.Claim(
            "without it: mean loss of the last tenth over the lowest of a tenth", broken[-1] / min(broken), ">=", 1.5
        ),
        study.Claim(
            "mean loss of the last tenth, without zero_grad() over with it", broken[-1] / mended[-1], ">=", 10.0
        ),
    ]


def draw(rows: Sequence[Difference], mended: Sequence[float], broken: Sequence[float]) -> Figure:
    """Draw differences by split for both normalisations, and both loops."""
    figure = figures.new_figure(13, 4.2)
    panels = figure.subplots(1, 3)
    for axes, name, title in (
        (panels[0], "logits", "Logits, split against whole"),
        (panels[1], "gradient", "Gradient, split against whole"),
    ):
        for norm, color, marker in (("BatchNorm", figures.VERMILION, "o"), ("LayerNorm", figures.BLUE, "s")):
            own = [row for row in rows if row.norm == norm]
            sizes = range(len(own))
            axes.plot(sizes, [getattr(row, name) for row in own], marker + "-", color=color, label=norm)
            axes.set_xticks(sizes, [f"{row.size}x{row.count}" for row in own])
        axes.set_yscale("symlog", linthresh=1e-16)
        axes.set_yticks([0, 1e-16, 1e-12, 1e-8, 1e-4, 1])
        axes.set_ylim(-5e-17, 1e2)
        axes.set(title=title, xlabel="images in a micro-batch x micro-batches")
        axes.legend(loc="center left")
    panels[0].set_ylabel("largest difference of a logit")
    panels[1].set_ylabel("relative difference of the gradient")
    panels[2].plot(broken, color=figures.VERMILION, label="without zero_grad()")
    panels[2].plot(mended, color=figures.BLUE, label="with zero_grad()")
    panels[2].set(title="A training loop with and without it", xlabel="step", yscale="log")
    panels[2].set_ylabel("mean cross entropy of the batch (nats)")
    panels[2].legend()
    for axes in panels:
        figures.add_grid(axes)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study accumulation`."""
    study.add_common_arguments(parser, "accumulation")
    parser.add_argument("--steps", type=whole, default=200, help="of both training loops (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compare, train both loops, print, draw."""
    study.require_matplotlib()
    digits = load_digits(torch.float64)
    rows = [row for norm in NORMS for row in compare(norm, digits, args.seed)]
    mended, broken = (train(zero_grad, digits, args.steps, args.seed) for zero_grad in (True, False))
    text = "Differences from the whole batch of 32\n" + text_table(
        ("normalisation", "split", "logits", "gradient (relative)", "logits after a step"),
        [(r.norm, f"{r.size} x {r.count}", r.logits, r.gradient, r.logits_after) for r in rows],
    )
    text += "\n\nMean loss of a training loop (nats)\n" + text_table(
        ("part of the run", "with zero_grad()", "without"),
        [
            (f"{10 * part} to {10 * part + 10} %", *pair)
            for part, pair in enumerate(zip(means_of_tenths(mended), means_of_tenths(broken), strict=True))
        ],
    )
    return study.finish("accumulation", text, claims_of(rows, (mended, broken)), draw(rows, mended, broken), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "accumulation", *sys.argv[1:]]))
