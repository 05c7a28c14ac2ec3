"""Looking up the value of the best key: what it returns, and why its queries and keys cannot learn.

    out = v_j,    j = argmax_j q.k_j

is the limit of softmax(q.k / T) v as the temperature T falls to 0. A small change of q or k leaves j as it is, so the
gradient to both is zero wherever it exists; the values still get theirs. The study trains a lookup whose queries must
be learned: x = R k_j for an unknown rotation R, and a matrix W shall make queries W x that find v_j.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor
from torch.nn import functional as F

from linattn import argmax_attention, softmax_attention
from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

KEYS = ((1.0, 2, 0), (0, 3, 4), (5, 0, 0), (0, 0, 1))
VALUES = ((2.0, 0, 1), (1, 4, 3), (0, -1, 4), (1, 0, -1))
QUERY = (1.0, 1, 2)
SCORES, OUTPUT = (3.0, 11, 5, 2), (1.0, 4, 3)

TEMPERATURES = tuple(2.0**power for power in range(5, -5, -1))
ENTRIES, SIZE, TRAINING_TEMPERATURE = 16, 8, 0.5


@dataclass(frozen=True)
class Example:
    """The worked example: scores, output and gradients of argmax; softmax's distances from it as T falls."""

    scores: list[float]
    output: list[float]
    q_gradient: float
    k_gradient: float
    v_gradient: float
    distances: list[float]
    softmax_q_gradients: list[float]


@dataclass(frozen=True)
class Lookup:
    """Training a lookup: share of the test queries that find their key, before each step; movement of W in all."""

    accuracy: list[float]
    moved: float


def worked_example() -> Example:
    """Compute the example of four keys and one query. The loss behind the gradients is the sum of the output."""
    q, k, v = (
        torch.tensor(rows, dtype=torch.float64).view(1, 1, -1, 3).requires_grad_() for rows in ([QUERY], KEYS, VALUES)
    )
    out = argmax_attention(q, k, v)
    q_gradient, k_gradient, v_gradient = (g.norm().item() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    distances, softmax_gradients = [], []
    for temperature in TEMPERATURES:
        soft = softmax_attention(q, k, v, scale=1 / temperature)
        distances.append((soft - out).norm().item())
        softmax_gradients.append(torch.autograd.grad(soft.sum(), q)[0].norm().item())
    return Example(
        (q @ k.mT).flatten().tolist(),
        out.flatten().tolist(),
        q_gradient,
        k_gradient,
        v_gradient,
        distances,
        softmax_gradients,
    )


def train_lookup(attention: Attention, steps: int, seed: int) -> Lookup:
    """Learn W so that the query W x finds the key behind x, by Adam on the squared error of the value found."""
    generator = torch.Generator().manual_seed(seed)
    k = F.normalize(torch.randn(ENTRIES, SIZE, generator=generator), dim=1)
    v = torch.randn(ENTRIES, SIZE, generator=generator)
    rotation = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    weight = (torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5).requires_grad_()
    start = weight.detach().clone()
    optimizer = torch.optim.Adam([weight], lr=0.05)
    inputs = k @ rotation.mT
    accuracy = []
    for _ in range(steps):
        q = inputs @ weight.mT
        accuracy.append(((q @ k.mT).argmax(1) == torch.arange(ENTRIES)).float().mean().item())
        out = attention(q.view(1, 1, ENTRIES, SIZE), k.view(1, 1, ENTRIES, SIZE), v.view(1, 1, ENTRIES, SIZE))
        loss = (out.view_as(v) - v).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Lookup(accuracy, (weight.detach() - start).norm().item())


def softmax_lookup(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Look up by softmax attention at a temperature low enough to look up, high enough to learn."""
    return softmax_attention(q, k, v, scale=1 / TRAINING_TEMPERATURE)


def claims_of(example: Example, soft: Lookup, hard: Lookup) -> list[study.Claim]:
    """Claim the course's numbers, the zero gradients, the limit, and who learns."""
    off = max(abs(a - b) for a, b in zip(example.scores + example.output, SCORES + OUTPUT, strict=True))
    return [
        study.Claim("distance of scores and output from (3, 11, 5, 2) and (1, 4, 3)", off, "<=", 0.0),
        study.Claim("gradient of argmax attention to q and k", example.q_gradient + example.k_gradient, "<=", 0.0),
        study.Claim("its gradient to the values", example.v_gradient, ">", 0.0),
        study.Claim(f"distance of softmax at T = {TEMPERATURES[-1]:g} from argmax", example.distances[-1], "<=", 1e-6),
        study.Claim("its gradient to q there", example.softmax_q_gradients[-1], "<=", 1e-6),
        study.Claim("accuracy of the lookup trained through softmax", soft.accuracy[-1], ">=", 0.95),
        study.Claim("movement of W when trained through argmax", hard.moved, "<=", 0.0),
        study.Claim(
            "accuracy of the lookup trained through argmax, gained", hard.accuracy[-1] - hard.accuracy[0], "<=", 0.0
        ),
    ]


def draw(example: Example, soft: Lookup, hard: Lookup) -> Figure:
    """Draw softmax on its way to argmax, and the accuracy of both while training."""
    figure = figures.new_figure(10.5, 4)
    left, right = figure.subplots(1, 2)
    shown = [(T, d, g) for T, d, g in zip(TEMPERATURES, example.distances, example.softmax_q_gradients, strict=True)]
    left.plot(
        [T for T, *_ in shown],
        [d for _, d, _ in shown],
        "o-",
        color=figures.BLUE,
        label="distance from argmax's output",
    )
    left.plot(
        [T for T, *_ in shown], [g for *_, g in shown], "s--", color=figures.GREEN, label="norm of the gradient at q"
    )
    left.axhline(0, color=figures.VERMILION, linewidth=3, label="argmax: both are exactly 0")
    left.set_xscale("log", base=2)
    left.set_yscale("symlog", linthresh=1e-6)
    left.set_ylim(-2e-7, 100)
    left.invert_xaxis()
    left.set(title="Softmax becomes argmax as T falls", xlabel="temperature T", ylabel="norm")
    chance = 100 / ENTRIES
    right.plot(
        [100 * share for share in soft.accuracy], color=figures.BLUE, label=f"softmax, T = {TRAINING_TEMPERATURE:g}"
    )
    right.plot([100 * share for share in hard.accuracy], color=figures.VERMILION, label="argmax")
    right.axhline(chance, color=figures.GREY, linestyle=":", label=f"guessing: {chance:.0f} %")
    right.set(title="Learning the queries of a lookup", xlabel="training step", ylim=(-3, 106))
    right.set_ylabel("queries that find their key (%)")
    right.legend(loc="center right")
    left.legend(loc="lower left", bbox_to_anchor=(0, 0.1))
    for axes in (left, right):
        figures.add_grid(axes)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study argmax`."""
    study.add_common_arguments(parser, "argmax")
    parser.add_argument("--steps", type=whole, default=300, help="of training (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compute, print, draw."""
    study.require_matplotlib()
    example = worked_example()
    soft, hard = (train_lookup(attention, args.steps, args.seed) for attention in (softmax_lookup, argmax_attention))
    text = f"scores {_vector(example.scores)}   argmax attention returns {_vector(example.output)}\n\n"
    text += text_table(
        ("T", "|softmax - argmax|", "gradient at q"),
        [
            *zip(TEMPERATURES, example.distances, example.softmax_q_gradients, strict=True),
            (0.0, 0.0, example.q_gradient),
        ],
    )
    text += "\n\n" + text_table(
        ("lookup trained through", "found before (%)", "found after (%)", "movement of W"),
        [
            (name, 100 * lookup.accuracy[0], 100 * lookup.accuracy[-1], lookup.moved)
            for name, lookup in (("softmax", soft), ("argmax", hard))
        ],
    )
    return study.finish("argmax", text, claims_of(example, soft, hard), draw(example, soft, hard), args)


def _vector(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "argmax", *sys.argv[1:]]))
