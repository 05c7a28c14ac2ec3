"""Test which similarities make good attention, and what the exact feature map of (1 + s)^2 is.

    out_i = sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j)

needs a denominator that stays away from zero. Of the similarities that are functions of s = q.k, exp(s) is positive
but comes as near to 0 as one likes, (1 + s)^2 is 0 at s = -1, and Taylor's 1 + s + s^2/2 = ((1 + s)^2 + 1) / 2 is never
below 1/2. The exact map of the quadratic kernel, with phi(q).phi(k) = (1 + q.k)^2, is

    phi(x) = [1, sqrt2 x_i, x_i^2, sqrt2 x_i x_j (i < j)]        (D + 1)(D + 2) / 2 features

Without the sqrt2 on the linear terms, as it is sometimes printed, it yields 1 + s + s^2.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor
from torch.nn import functional as F

from linattn import kernel_attention, linear_attention, quadratic_attention
from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

# Similarities as functions of the score s. Their smallest values over all s are known exactly.
OF_SCORE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp(s)": torch.exp,
    "(1+s)^2": lambda s: (1 + s).square(),
    "1+s+s^2/2": lambda s: 1 + s + s.square() / 2,
    "s^2": torch.square,
    "s": lambda s: s,
}
INFIMUM = {"exp(s)": 0.0, "(1+s)^2": 0.0, "1+s+s^2/2": 0.5, "s^2": 0.0, "s": -math.inf}
# Similarities phi(q).phi(k) with phi elementwise.
OF_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu(q)+1": lambda x: F.elu(x) + 1,
    "relu(q)": F.relu,
    "exp(q)": torch.exp,
}
COMPARED = {"exp(s)": figures.BLUE, "1+s+s^2/2": figures.GREEN, "(1+s)^2": figures.ORANGE}
SIZE = 16
SMALL = 1e-3


@dataclass(frozen=True)
class Denominators:
    """A similarity on random queries: smallest value over all keys, over rows of 4 keys, and small rows."""

    name: str
    infimum: float
    smallest: float
    smallest_row: float
    small_rows: float


@dataclass(frozen=True)
class Maps:
    """Largest errors of feature maps: of their products, and of attention computed through them."""

    exact: float
    misprinted: float
    misprinted_as_what_it_is: float
    attention_exact: float
    attention_misprinted: float
    features: int


@dataclass(frozen=True)
class Weights:
    """Attention of the same queries over the same keys.

    Attributes:
        scores: of one query's keys, from high to low.
        weights: its attention to each of them.
        moved: share of the weight that lies on other keys than softmax's, mean over all queries: half the sum of
            absolute differences.
        entropy: of the weights in nats, mean over all queries.
    """

    scores: Tensor
    weights: dict[str, Tensor]
    moved: dict[str, float]
    entropy: dict[str, float]


def quadratic_features(x: Tensor, linear: float) -> Tensor:
    """Compute [1, linear x_i, x_i^2, sqrt2 x_i x_j (i < j)] along the last axis: exact with linear = sqrt2."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1)
    return torch.cat((torch.ones_like(x[..., :1]), linear * x, x.square(), math.sqrt(2) * x[..., i] * x[..., j]), -1)


def exact_map(x: Tensor) -> Tensor:
    """Map so that phi(q).phi(k) = (1 + q.k)^2."""
    return quadratic_features(x, math.sqrt(2))


def misprinted_map(x: Tensor) -> Tensor:
    """Map without sqrt2 on the linear terms."""
    return quadratic_features(x, 1.0)


def measure_denominators(rows: int, generator: torch.Generator) -> list[Denominators]:
    """Measure the row sums over 4 keys, as a causal sequence starts with; scores divided by sqrt(D) as in a model."""
    q, k = (torch.randn(rows, n, SIZE, generator=generator, dtype=torch.float64) for n in (1, 4))
    score = (q @ k.mT).squeeze(1) / math.sqrt(SIZE)
    values = {name: sim(score) for name, sim in OF_SCORE.items()}
    values |= {name: (phi(q) @ phi(k).mT).squeeze(1) for name, phi in OF_FEATURES.items()}
    return [
        Denominators(
            name,
            INFIMUM.get(name, 0.0),
            value.min().item(),
            value.mean(1).min().item(),
            (value.mean(1) < SMALL).double().mean().item(),
        )
        for name, value in values.items()
    ]


def measure_maps(generator: torch.Generator) -> Maps:
    """Compare both maps against the kernels that they should be, and attention through them against
    `quadratic_attention`.
    """
    q, k, v = (torch.randn(1, 2, 40, SIZE, generator=generator, dtype=torch.float64) / 2 for _ in range(3))
    s = q @ k.mT
    products = {phi: phi(q) @ phi(k).mT for phi in (exact_map, misprinted_map)}
    truth = quadratic_attention(q, k, v)
    through = {phi: linear_attention(q, k, v, feature_map=phi) for phi in (exact_map, misprinted_map)}
    square = (1 + s).square()
    return Maps(
        (products[exact_map] - square).abs().max().item(),
        (products[misprinted_map] - square).abs().max().item(),
        (products[misprinted_map] - (1 + s + s.square())).abs().max().item(),
        (through[exact_map] - truth).abs().max().item(),
        (through[misprinted_map] - truth).abs().max().item(),
        exact_map(q).shape[-1],
    )


def compare_weights(queries: int, keys: int, generator: torch.Generator) -> Weights:
    """Compare weights: the library's attention over unit vectors as values is the weights themselves."""
    q, k = (torch.randn(1, 1, n, SIZE, generator=generator, dtype=torch.float64) for n in (queries, keys))
    all_scores = (q[0, 0] @ k[0, 0].mT) / math.sqrt(SIZE)
    # The query with the most opposite key shows best where the kernels part.
    shown = all_scores.amin(1).argmin()
    scores, order = all_scores[shown].sort(descending=True)
    k, names = k[:, :, order], torch.eye(keys, dtype=torch.float64)[None, None]
    all_weights = {name: kernel_attention(q, k, names, sim=partial(_scaled, OF_SCORE[name]))[0, 0] for name in COMPARED}
    softmax = all_weights["exp(s)"]
    return Weights(
        scores,
        {name: weights[shown] for name, weights in all_weights.items()},
        {name: (weights - softmax).abs().sum(1).mean().item() / 2 for name, weights in all_weights.items()},
        {name: torch.special.entr(weights).sum(1).mean().item() for name, weights in all_weights.items()},
    )


def _scaled(sim: Callable[[Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    return sim(q @ k.mT / math.sqrt(SIZE))


def claims_of(denominators: Sequence[Denominators], maps: Maps, weights: Weights) -> list[study.Claim]:
    """Claim that only Taylor is bounded away from 0; the exact map is exact, the misprinted one another kernel."""
    by_name = {row.name: row for row in denominators}
    rivals = [by_name[name].smallest_row for name in ("(1+s)^2", "s^2", "s", "relu(q)")]
    opposite = weights.weights["(1+s)^2"][-1] / weights.weights["exp(s)"][-1]
    return [
        study.Claim("smallest 1+s+s^2/2 of all keys drawn", by_name["1+s+s^2/2"].smallest, ">=", 0.5),
        study.Claim(
            "largest of the smallest mean similarities of a row among (1+s)^2, s^2, s, relu", max(rivals), "<=", 0.05
        ),
        study.Claim("largest error of the exact map against (1+s)^2", maps.exact, "<=", 1e-12),
        study.Claim("largest error of attention through the exact map", maps.attention_exact, "<=", 1e-12),
        study.Claim("largest error of the misprinted map against (1+s)^2", maps.misprinted, ">=", 0.1),
        study.Claim("largest error of the misprinted map against 1+s+s^2", maps.misprinted_as_what_it_is, "<=", 1e-12),
        study.Claim("weight of the key with the lowest score, (1+s)^2 over softmax", opposite.item(), ">", 1.0),
        study.Claim(
            "share of the weight that Taylor moves from softmax's keys", weights.moved["1+s+s^2/2"], "<=", 0.15
        ),
        study.Claim(
            "the same for (1+s)^2, over Taylor's", weights.moved["(1+s)^2"] / weights.moved["1+s+s^2/2"], ">", 1.0
        ),
    ]


def draw(denominators: Sequence[Denominators], weights: Weights) -> Figure:
    """Draw the similarities over s, the misprint beside the exact kernel, smallest rows, and one query's weights."""
    figure = figures.new_figure(13, 8)
    (curves, misprint), (bars, attention) = figure.subplots(2, 2)
    s = torch.linspace(-3, 3, 301)
    for name, color in {**COMPARED, "s^2": figures.PURPLE}.items():
        curves.plot(s, OF_SCORE[name](s), color=color, label=_pretty(name))
    curves.axhline(0.5, color=figures.GREEN, linestyle=":", label="1/2: Taylor never falls below")
    curves.set(title="Similarities of a score", ylabel="sim(s)", ylim=(0, 6))
    misprint.plot(s, (1 + s).square(), color=figures.ORANGE, label="with √2: (1 + s)², exact")
    misprint.plot(s, 1 + s + s.square(), "--", color=figures.VERMILION, label="without √2: 1 + s + s²")
    misprint.set(title="The feature map, printed with and without √2", ylabel="φ(q)·φ(k)", ylim=(0, 6))
    for axes in (curves, misprint):
        axes.set_xlabel("score s = q·k")
        # Centred where no curve is.
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1), fontsize=9)
    shown = [row for row in denominators if row.smallest_row > 0]
    names = [_pretty(row.name) for row in shown]
    bars.barh(names, [row.smallest_row for row in shown], color=[COMPARED.get(row.name, figures.GREY) for row in shown])
    bars.set(xscale="log", title="Worst of many rows of 4 keys", xlabel="smallest mean similarity of a row")
    left_out = [_pretty(row.name) for row in denominators if row.smallest_row <= 0]
    if left_out:
        bars.text(0.02, 0.98, f"at or below 0: {', '.join(left_out)}", transform=bars.transAxes, va="top")
        bars.set_ylim(-0.6, len(shown) + 0.2)
    for name, color in COMPARED.items():
        attention.plot(
            weights.scores, 100 * weights.weights[name], "o-", markersize=4, color=color, label=_pretty(name)
        )
    attention.axvline(-1, color=figures.GREY, linestyle=":", label="s = -1")
    attention.set(title="One query, the same keys", xlabel="score s of the key", ylabel="attention weight (%)")
    attention.set(yscale="log", ylim=(1e-4, 100))
    attention.legend(loc="lower right")
    for axes in (curves, misprint, bars, attention):
        figures.add_grid(axes)
    return figure


def _pretty(name: str) -> str:
    return name.replace("^2", "²").replace("+", " + ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study kernels`."""
    study.add_common_arguments(parser, "kernels")
    parser.add_argument("--rows", type=whole, default=100_000, help="of random keys (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compute, print, draw."""
    study.require_matplotlib()
    generator = torch.Generator().manual_seed(args.seed)
    denominators = measure_denominators(args.rows, generator)
    maps = measure_maps(generator)
    weights = compare_weights(200, 40, generator)
    text = f"{args.rows} random rows of 4 keys, D = {SIZE}\n"
    text += text_table(
        ("similarity", "infimum", "smallest drawn", "smallest mean of a row", f"rows below {SMALL:g} (%)"),
        [(r.name, r.infimum, r.smallest, r.smallest_row, 100 * r.small_rows) for r in denominators],
    )
    text += f"\n\nFeature maps of the quadratic kernel, {maps.features} features; largest errors\n" + text_table(
        ("map", "against (1+s)^2", "against 1+s+s^2", "attention"),
        [
            ("exact", maps.exact, "", maps.attention_exact),
            ("misprinted", maps.misprinted, f"{maps.misprinted_as_what_it_is:.4g}", maps.attention_misprinted),
        ],
    )
    text += "\n\nThe same 200 queries over the same 40 keys\n" + text_table(
        ("similarity", "moved from softmax's keys (%)", "entropy (nats)"),
        [(name, 100 * weights.moved[name], weights.entropy[name]) for name in COMPARED],
    )
    text += "\n\nOne of these queries: weight (%) by score\n" + text_table(
        ("s", *COMPARED),
        [
            (weights.scores[at].item(), *(100 * weights.weights[name][at].item() for name in COMPARED))
            for at in range(0, len(weights.scores), 3)
        ],
    )
    return study.finish("kernels", text, claims_of(denominators, maps, weights), draw(denominators, weights), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "kernels", *sys.argv[1:]]))
