"""Measure how well feature maps stand in for softmax, by their number of features.

    softmax    w_j ~ exp(s_j),    s_j = q.k_j / sqrt(D)        a map    w_j ~ phi(q).phi(k_j)

A weight is a share, so the error of a map is the share of the weight that it moves to other keys than softmax's: half
the sum of |w - w_softmax|. It depends on how far the scores spread: at a small spread all weights are alike and any map
does, at a large one a few keys take all and none of these does well.

FAVOR+ is right on average, and its error falls with the number m of random features. Of one product phi(q).phi(k) with
independent features, relative to its mean exp(s), the standard deviation is known:

    sqrt((exp(|q' + k'|^2) - 1) / m),    q' = D^(-1/4) q,  k' = D^(-1/4) k

Taylor's polynomial has no randomness and no dial. Hedgehog's W is learned, here from softmax's own weights on random
queries and keys. The elementwise maps were not made to approximate softmax and are shown for comparison.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.feature_maps import Favor, Hedgehog, make

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = 16
QUERIES = KEYS = 256
COUNTS = (16, 32, 64, 128, 256, 512, 1024, 2048)
LEARNED = (16, 32, 64, 128, 256)
SPREADS = (0.25, 0.5, 1.0, 2.0)
SPREAD = 1.0  # where errors are shown against the number of features
NEAR_TAYLOR = 160  # features, about Taylor's 153 at D = 16
FIXED = {
    "taylor-features": figures.GREEN,
    "elu+1": figures.GREY,
    "exp": figures.VERMILION,
    "relu2": figures.PURPLE,
    "dpfp": figures.SKY,
    "softmax-features": "black",
}

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimates:
    """FAVOR+'s estimate of exp(s) for one query and key with m independent features: relative standard deviation."""

    counts: tuple[int, ...]
    measured: list[float]
    theory: list[float]

    @property
    def slope(self) -> float:
        """Fit log(measured) over log(m) by least squares."""
        return linear_regression(*([math.log(x) for x in along] for along in (self.counts, self.measured))).slope


def draw_queries_and_keys(spread: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw Gaussian q [QUERIES, D] and k [KEYS, D] whose scores q.k / sqrt(D) have standard deviation `spread`."""
    q, k = (torch.randn(n, SIZE, generator=generator) * math.sqrt(spread) for n in (QUERIES, KEYS))
    return q, k


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return the weights of softmax attention, `[..., queries, keys]`."""
    return (q @ k.mT / math.sqrt(SIZE)).softmax(-1)


def map_weights(phi: Map, q: Tensor, k: Tensor) -> Tensor:
    """Return the weights of attention by a feature map, `[..., queries, keys]`."""
    similarity = phi(q) @ phi(k).mT
    return similarity / similarity.sum(-1, keepdim=True).clamp(min=torch.finfo(similarity.dtype).tiny)


def moved(phi: Map, q: Tensor, k: Tensor) -> float:
    """Return the share of the weight that a map moves away from softmax's keys, mean over queries."""
    return (map_weights(phi, q, k) - softmax_weights(q, k)).abs().sum(-1).mean().item() / 2


def moved_share_of_favor(count: int, orthogonal: bool, spread: float, draws: int, generator: torch.Generator) -> float:
    """Return the moved share of FAVOR+, mean over draws of the random features."""
    shares = []
    for _ in range(draws):
        q, k = draw_queries_and_keys(spread, generator)
        shares.append(moved(Favor(SIZE, count, orthogonal=orthogonal, generator=generator), q, k))
    return sum(shares) / draws


def learn_hedgehog(count: int, spread: float, steps: int, generator: torch.Generator) -> Hedgehog:
    """Train a map by Adam, on fresh queries and keys, to weights near softmax's in cross entropy."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    phi = Hedgehog(SIZE, count)
    optimizer = torch.optim.Adam(phi.parameters(), lr=0.03)
    for _ in range(steps):
        q, k = draw_queries_and_keys(spread, generator)
        loss = -(softmax_weights(q, k) * map_weights(phi, q, k).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return phi.requires_grad_(False)


def measure_estimates(draws: int, generator: torch.Generator) -> Estimates:
    """Estimate by independent features for one query and key of length sqrt(D) / 2, drawn again and again."""
    q, k = (x / x.norm() * math.sqrt(SIZE) / 2 for x in torch.randn(2, SIZE, generator=generator, dtype=torch.float64))
    counts = COUNTS[:6]
    measured = []
    for count in counts:
        phi = Favor(SIZE, count * draws, orthogonal=False, generator=generator).double()
        product = (phi(q) * phi(k) * draws).reshape(draws, count).sum(-1)
        measured.append((product.std() / (q @ k / math.sqrt(SIZE)).exp()).item())
    length = ((q + k).square().sum() / math.sqrt(SIZE)).item()
    return Estimates(counts, measured, [math.sqrt((math.exp(length) - 1) / count) for count in counts])


@dataclass(frozen=True)
class Shares:
    """Shares of weight moved.

    Attributes:
        favor, independent, hedgehog: by number of features, at SPREAD. fixed: by name, at SPREAD.
        by_spread: by name, one share for each of SPREADS, with NEAR_TAYLOR features where there is a choice.
    """

    favor: dict[int, float]
    independent: dict[int, float]
    hedgehog: dict[int, float]
    fixed: dict[str, float]
    by_spread: dict[str, list[float]]


def measure_shares(draws: int, steps: int, generator: torch.Generator) -> Shares:
    """Measure the share that each map moves."""
    test = {spread: draw_queries_and_keys(spread, generator) for spread in SPREADS}
    by_spread: dict[str, list[float]] = {
        "FAVOR+": [moved_share_of_favor(NEAR_TAYLOR, True, spread, draws, generator) for spread in SPREADS],
        "hedgehog, learned": [
            moved(learn_hedgehog(NEAR_TAYLOR, spread, steps, generator), *test[spread]) for spread in SPREADS
        ],
        "all keys alike": [moved(lambda x: torch.ones_like(x[..., :1]), *test[spread]) for spread in SPREADS],
    }
    for name in FIXED:
        by_spread[name] = [moved(make(name, SIZE), *test[spread]) for spread in SPREADS]
    return Shares(
        {count: moved_share_of_favor(count, True, SPREAD, draws, generator) for count in COUNTS},
        {count: moved_share_of_favor(count, False, SPREAD, draws, generator) for count in COUNTS},
        {count: moved(learn_hedgehog(count, SPREAD, steps, generator), *test[SPREAD]) for count in LEARNED},
        {name: by_spread[name][SPREADS.index(SPREAD)] for name in FIXED},
        by_spread,
    )


def claims_of(shares: Shares, estimates: Estimates) -> list[study.Claim]:
    """Claim that theory holds; orthogonal features help; Taylor is the better one at small scores."""
    worst = max(abs(m / t - 1) for m, t in zip(estimates.measured, estimates.theory, strict=True))
    few, many = COUNTS[0], COUNTS[-1]
    ratio = sum(shares.favor.values()) / sum(shares.independent.values())
    small, large = (SPREADS.index(spread) for spread in (0.5, 2.0))
    taylor, favor, learned, alike = (
        shares.by_spread[name] for name in ("taylor-features", "FAVOR+", "hedgehog, learned", "all keys alike")
    )
    return [
        study.Claim("standard deviation of FAVOR+'s estimate: largest deviation from theory", worst, "<=", 0.2),
        study.Claim("its slope over the number of features, log to log", estimates.slope, "<=", -0.45),
        study.Claim("the same", estimates.slope, ">=", -0.55),
        study.Claim(
            f"share moved by FAVOR+ with {many} features over that with {few}",
            shares.favor[many] / shares.favor[few],
            "<=",
            0.6,
        ),
        study.Claim("share moved by orthogonal over independent features, all counts together", ratio, "<=", 1.0),
        study.Claim(
            "spread 0.5: share moved by Taylor over FAVOR+ with as many features",
            taylor[small] / favor[small],
            "<=",
            0.5,
        ),
        study.Claim(
            "spread 2: share moved by a learned map over FAVOR+ with as many features",
            learned[large] / favor[large],
            "<=",
            1.0,
        ),
        study.Claim(
            "spread 2: share moved by the best of all maps",
            min(row[large] for row in shares.by_spread.values()),
            ">=",
            0.1,
        ),
        study.Claim("spread 2: share moved when all keys count alike", alike[large], ">=", 0.5),
    ]


def draw(shares: Shares, estimates: Estimates) -> Figure:
    """Draw share against features, share against spread, and the estimate of one product against theory."""
    figure = figures.new_figure(16, 5)
    by_count, by_spread, one = figure.subplots(1, 3)
    lines: Sequence[tuple[str, Mapping[int, float], str, str]] = (
        ("FAVOR+, orthogonal", shares.favor, figures.BLUE, "o-"),
        ("FAVOR+, independent", shares.independent, figures.BLUE, "o--"),
        ("hedgehog, learned", shares.hedgehog, figures.ORANGE, "s-"),
    )
    for label, values, color, style in lines:
        by_count.plot(list(values), [100 * v for v in values.values()], style, color=color, markersize=4, label=label)
    for name, share in shares.fixed.items():
        by_count.plot(make(name, SIZE).size, 100 * share, "D", color=FIXED[name], label=name)
    by_count.set(xscale="log", yscale="log", xlabel="features C", title=f"Scores of spread {SPREAD:g}, D = {SIZE}")
    _plain_ticks(by_count, COUNTS, (5, 10, 20, 30, 50))
    by_count.set_ylabel("weight moved from softmax's keys (%)")
    by_count.legend(fontsize=8)
    colors = {
        "FAVOR+": figures.BLUE,
        "hedgehog, learned": figures.ORANGE,
        "all keys alike": figures.LIGHT_GREY,
        **FIXED,
    }
    for name, row in shares.by_spread.items():
        label = f"{name}, {NEAR_TAYLOR} features" if name in ("FAVOR+", "hedgehog, learned") else name
        by_spread.plot(SPREADS, [100 * v for v in row], "o-", markersize=4, color=colors[name], label=label)
    by_spread.set(xscale="log", yscale="log", xlabel="standard deviation of the scores", title="More spread is harder")
    by_spread.set_ylabel("weight moved from softmax's keys (%)")
    _plain_ticks(by_spread, SPREADS, (0.2, 0.5, 1, 2, 5, 10, 20, 50))
    by_spread.legend(fontsize=8)
    one.plot(estimates.counts, [100 * m for m in estimates.measured], "o", color=figures.BLUE, label="measured")
    one.plot(estimates.counts, [100 * t for t in estimates.theory], color=figures.GREY, label="theory")
    one.set(xscale="log", yscale="log", xlabel="random features m", title="FAVOR+'s estimate of one exp(s)")
    one.set_ylabel("standard deviation (% of exp(s))")
    _plain_ticks(one, estimates.counts, (5, 10, 20, 30))
    one.legend()
    for axes in (by_count, by_spread, one):
        figures.add_grid(axes, which="both")
    return figure


def _plain_ticks(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Write ticks as plain numbers, where a logarithmic axis would have powers of ten."""
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_yticks(y, [f"{value:g}" for value in y])
    axes.minorticks_off()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study maps`."""
    study.add_common_arguments(parser, "maps")
    parser.add_argument("--draws", type=whole, default=10, help="of random features (%(default)s)")
    parser.add_argument("--steps", type=whole, default=300, help="of learning a map (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compute, print, draw."""
    study.require_matplotlib()
    generator = torch.Generator().manual_seed(args.seed)
    estimates = measure_estimates(100 * args.draws, generator)
    shares = measure_shares(args.draws, args.steps, generator)
    text = f"Weight moved from softmax's keys (%), D = {SIZE}, scores of spread {SPREAD:g}\n" + text_table(
        ("features", "FAVOR+ orthogonal", "FAVOR+ independent", "hedgehog, learned"),
        [
            (
                str(count),
                100 * shares.favor[count],
                100 * shares.independent[count],
                f"{100 * shares.hedgehog[count]:.4g}" if count in shares.hedgehog else "",
            )
            for count in COUNTS
        ],
    )
    text += "\n\nThe same by spread of the scores\n" + text_table(
        ("map", *(f"{spread:g}" for spread in SPREADS)),
        [(name, *(100 * v for v in row)) for name, row in shares.by_spread.items()],
    )
    text += "\n\nFAVOR+'s estimate of one exp(s): standard deviation (%)\n" + text_table(
        ("features", "measured", "theory"),
        [
            (str(count), 100 * m, 100 * t)
            for count, m, t in zip(estimates.counts, estimates.measured, estimates.theory, strict=True)
        ],
    )
    return study.finish("maps", text, claims_of(shares, estimates), draw(shares, estimates), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "maps", *sys.argv[1:]]))
