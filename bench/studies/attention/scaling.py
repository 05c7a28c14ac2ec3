"""Why scores are divided by sqrt(D): what it does to the softmax and to the gradients behind it.

For q, k ~ N(mu, s^2 I) in D dimensions

    E[q.k] = |mu|^2        Var[q.k] = 2 s^2 |mu|^2 + D s^4

so at mu = 0, s = 1 scores have standard deviation sqrt(D). Left as they are, softmax puts everything on one key as D
grows, and the gradient falls apart: the few queries that still waver between two keys get a large one, growing with
|k| ~ sqrt(D), and the rest get nothing. Hence medians and quantiles here: the norm over all queries even grows.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch

from linattn import softmax_attention
from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAWS = ((0.0, 1.0), (0.5, 1.5))
KEYS, VALUE_SIZE = 64, 16
SMALLEST_SHOWN = 1e-7
QUANTILES = (0.1, 0.5, 0.9)
WHAT_Q, WHAT_K = "median gradient of a query", "median gradient of a query's keys"


@dataclass(frozen=True)
class Moments:
    """Mean and variance of q.k over a sample whose entries are from N(mu, s^2), beside theory."""

    D: int
    mu: float
    s: float
    mean: float
    variance: float

    @property
    def true_mean(self) -> float:
        """Return the mean that theory gives to a score."""
        return self.D * self.mu**2

    @property
    def true_variance(self) -> float:
        """Return the variance that theory gives to a score."""
        return 2 * self.s**2 * self.D * self.mu**2 + self.D * self.s**4


@dataclass(frozen=True)
class Saturation:
    """Softmax over the keys at one D with one scale.

    Attributes:
        entropy: mean over the queries, in nats.
        q_gradient: quantiles (`QUANTILES`) over the queries of the norm of the gradient that reaches the query.
        k_gradient: the same for all keys that this query saw, together.
    """

    D: int
    entropy: float
    q_gradient: list[float]
    k_gradient: list[float]


def sample_moments(D: int, mu: float, s: float, samples: int, generator: torch.Generator) -> Moments:
    """Sample the moments of q.k for entries drawn from N(mu, s^2)."""
    q, k = (mu + s * torch.randn(samples, D, generator=generator) for _ in range(2))
    scores = (q * k).sum(1).double()
    return Moments(D, mu, s, scores.mean().item(), scores.var().item())


def measure_saturation(D: int, scale: float, queries: int, generator: torch.Generator) -> Saturation:
    """Measure saturation: each query has its own keys and values from N(0, 1); the loss is a random projection of the
    output.
    """
    q, k = (torch.randn(queries, 1, n, D, generator=generator).requires_grad_() for n in (1, KEYS))
    v, direction = (torch.randn(queries, 1, n, VALUE_SIZE, generator=generator) for n in (KEYS, 1))
    loss = (softmax_attention(q, k, v, scale=scale) * direction).sum()
    gradients = torch.autograd.grad(loss, (q, k))
    # Attention over unit vectors as values is the weights themselves.
    p = softmax_attention(q.detach(), k.detach(), torch.eye(KEYS).expand(queries, 1, KEYS, KEYS), scale=scale)
    of_q, of_k = (g.flatten(1).norm(dim=1).quantile(torch.tensor(QUANTILES)).tolist() for g in gradients)
    return Saturation(D, torch.special.entr(p).sum(-1).mean().item(), of_q, of_k)


def claims_of(
    moments: Sequence[Moments], bare: Sequence[Saturation], scaled: Sequence[Saturation], samples: int
) -> list[study.Claim]:
    """Claim that theory holds within sampling error; softmax saturates without the scale and does not with it."""
    mean_error = max(abs(m.mean - m.true_mean) / math.sqrt(m.true_variance / samples) for m in moments)
    variance_error = max(abs(m.variance / m.true_variance - 1) for m in moments)
    D, most = bare[-1].D, math.log(KEYS)
    return [
        study.Claim("largest distance of a mean from |mu|^2, in standard errors", mean_error, "<=", 5.0),
        # A score's kurtosis is at most 3 + 6 / D, so 5 standard errors of a variance are at most this.
        study.Claim(
            "largest relative distance of a variance from 2 s^2 |mu|^2 + D s^4",
            variance_error,
            "<=",
            5 * math.sqrt((2 + 6 / min(m.D for m in moments)) / samples),
        ),
        study.Claim(
            f"entropy with the scale at D = {D}, as a share of log({KEYS})", scaled[-1].entropy / most, ">=", 0.8
        ),
        study.Claim(f"entropy without the scale at D = {D}, likewise", bare[-1].entropy / most, "<=", 0.1),
        study.Claim(f"{WHAT_Q} with the scale at D = {D}, over its largest", _fall(scaled, "q_gradient"), ">=", 0.5),
        study.Claim(f"{WHAT_Q} without the scale, likewise", _fall(bare, "q_gradient"), "<=", 0.05),
        study.Claim(f"{WHAT_K} without the scale, likewise", _fall(bare, "k_gradient"), "<=", 0.05),
        study.Claim(
            f"90 % over 10 % of the queries' gradients with the scale, D = {D}", _spread(scaled[-1]), "<=", 5.0
        ),
        study.Claim("the same without the scale", _spread(bare[-1]), ">=", 1000.0),
    ]


def _fall(rows: Sequence[Saturation], name: str) -> float:
    medians = [getattr(row, name)[1] for row in rows]
    return float(medians[-1] / max(medians))


def _spread(row: Saturation) -> float:
    return row.q_gradient[2] / max(row.q_gradient[0], torch.finfo(torch.float32).tiny)


def draw(moments: Sequence[Moments], bare: Sequence[Saturation], scaled: Sequence[Saturation]) -> Figure:
    """Draw variance against theory, entropy, and the gradient that reaches a query, all over D."""
    figure = figures.new_figure(13, 4.2)
    left, middle, right = figure.subplots(1, 3)
    for (mu, s), color in zip(LAWS, (figures.BLUE, figures.ORANGE), strict=True):
        law = [m for m in moments if (m.mu, m.s) == (mu, s)]
        D = [m.D for m in law]
        left.plot(D, [m.true_variance for m in law], color=color, label=f"variance, theory: entries N({mu:g}, {s:g}²)")
        left.plot(D, [m.variance for m in law], "o", color=color, label="variance, sampled")
        if mu:
            left.plot(D, [m.true_mean for m in law], "--", color=color, label="mean, theory")
            left.plot(D, [m.mean for m in law], "s", color=color, markerfacecolor="white", label="mean, sampled")
    left.set(title="Scores q·k spread as D grows", ylabel="mean and variance of q·k", yscale="log")
    for rows, color, label in ((scaled, figures.BLUE, "divided by √D"), (bare, figures.VERMILION, "not divided")):
        D = [row.D for row in rows]
        middle.plot(D, [row.entropy for row in rows], "o-", color=color, label=label)
        low, median, high = ([max(row.q_gradient[i], SMALLEST_SHOWN) for row in rows] for i in range(len(QUANTILES)))
        right.plot(D, median, "o-", color=color, label=f"{label}: median query")
        right.fill_between(D, low, high, color=color, alpha=0.2, linewidth=0, label="10 to 90 % of the queries")
    middle.axhline(math.log(KEYS), color="black", linestyle=":", label=f"all {KEYS} keys alike: log {KEYS}")
    middle.set(title="Without the scale softmax picks one key", ylabel="entropy of the weights (nats)", ylim=(0, 4.9))
    right.set(title="... and most queries stop learning", ylabel="norm of the gradient at a query", yscale="log")
    right.set_ylim(SMALLEST_SHOWN, 1e3)
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(D) for D in SIZES])
        axes.minorticks_off()
        axes.set_xlabel("head size D")
        figures.add_grid(axes)
        axes.legend(fontsize=8, frameon=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study scaling`."""
    study.add_common_arguments(parser, "scaling")
    parser.add_argument("--samples", type=whole, default=20_000, help="of q.k for each moment (%(default)s)")
    parser.add_argument("--queries", type=whole, default=256, help="for each gradient (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw."""
    study.require_matplotlib()
    generator = torch.Generator().manual_seed(args.seed)
    moments = [sample_moments(D, mu, s, args.samples, generator) for mu, s in LAWS for D in SIZES]
    bare = [measure_saturation(D, 1.0, args.queries, generator) for D in SIZES]
    scaled = [measure_saturation(D, 1 / math.sqrt(D), args.queries, generator) for D in SIZES]
    text = text_table(
        ("mu", "s", "D", "mean", "|mu|^2", "variance", "2 s^2|mu|^2 + D s^4"),
        [(m.mu, m.s, m.D, m.mean, m.true_mean, m.variance, m.true_variance) for m in moments],
    )
    text += "\n\nEntropy (nats) and median gradient norms; 'bare' is without the scale\n" + text_table(
        ("D", "entropy", "bare", "of q", "bare", "of k", "bare"),
        [
            (b.D, a.entropy, b.entropy, a.q_gradient[1], b.q_gradient[1], a.k_gradient[1], b.k_gradient[1])
            for a, b in zip(scaled, bare, strict=True)
        ],
    )
    claims = claims_of(moments, bare, scaled, args.samples)
    return study.finish("scaling", text, claims, draw(moments, bare, scaled), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "scaling", *sys.argv[1:]]))
