"""Beam search: the worked example of the course, the optimum that it misses, and what a search costs.

Two words, "neural" and "network". With two beams the search keeps "neural network" and "network neural" after two steps
and drops "neural neural", which is a little less probable then, but goes on to the best sentence of all.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
from torch import Tensor

from linattn._util import figures
from linattn._util.tables import text_table
from linattn.bench.measuring.timing import side_by_side, summarise
from linattn.bench.studies.common import study
from linattn.rnn import beam_search

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from linattn.rnn.beam import Step

WORDS = ("neural", "network")
STEPS = 3
# log p of the next word, "neural" and "network", behind what stands before it. Printed in the course's figure: -0.65
# and -0.73, -1.25 and -1.33, -1.85 and -1.93, -1.46. The others follow because probabilities sum to 1.
EXAMPLE: dict[tuple[int, ...], tuple[float, float]] = {
    (): (-0.65, -0.73),
    (0,): (-0.80, -0.60),
    (1,): (-0.60, -0.80),
    (0, 0): (-0.01, -4.60),
    (0, 1): (-0.60, -0.80),
    (1, 0): (-0.60, -0.80),
    (1, 1): (-0.60, -0.80),
}
MIDDLE = {"T": 16, "K": 8, "M": 16384}
AXES = {"T": (4, 8, 16, 32, 64), "K": (2, 4, 8, 16, 32), "M": (4096, 8192, 16384, 32768, 65536)}


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a search over T steps with K beams and M words."""

    axis: str
    T: int
    K: int
    M: int
    ms: float

    @property
    def bound(self) -> float:
        """Return T K M log M, which bounds the cost up to a factor."""
        return self.T * self.K * self.M * math.log(self.M)


def example_step(tokens: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take a step of the example; the state is the text so far, int64 `[R, t]`."""
    text = tokens.new_zeros(len(tokens), 0) if text is None else torch.cat((text, tokens[:, None]), 1)
    return torch.tensor([EXAMPLE[tuple(row)] for row in text.tolist()]), text


def exhaustive(step_fn: Step, words: int, steps: int) -> tuple[tuple[int, ...], float]:
    """Find the most probable of all words^steps texts, and its log p."""
    texts = torch.tensor(list(product(range(words), repeat=steps)))
    tokens, state, total = torch.zeros(len(texts), dtype=torch.int64), None, torch.zeros(len(texts))
    for t in range(steps):
        log_probs, state = step_fn(tokens, state)
        tokens = texts[:, t]
        total = total + log_probs.gather(1, tokens[:, None])[:, 0]
    best = int(total.argmax())
    return tuple(texts[best].tolist()), total[best].item()


def search_example(beams: int) -> list[tuple[str, float]]:
    """Search the example with so many beams; return what is found, best first."""
    result = beam_search(example_step, None, torch.tensor([0]), beams=beams, max_length=STEPS, n_best=min(beams, 2))
    texts = (" ".join(WORDS[token] for token in row) for row in result.tokens[0].tolist())
    return list(zip(texts, result.log_probs[0].tolist(), strict=True))


def measure_costs(rounds_s: float, seed: int) -> list[Cost]:
    """Time of the search alone: log-probabilities are drawn beforehand. Each axis in turn, the others in the middle."""
    generator = torch.Generator().manual_seed(seed)
    costs = []
    for axis, values in AXES.items():
        sizes = [{**MIDDLE, axis: value} for value in values]
        calls = {str(size): make_searcher(**size, generator=generator) for size in sizes}
        samples, _ = side_by_side(calls, device=torch.device("cpu"), budget_s=rounds_s)
        costs += [Cost(axis, **size, ms=summarise(samples[str(size)]).median) for size in sizes]
    return costs


def make_searcher(T: int, K: int, M: int, generator: torch.Generator):  # type: ignore[no-untyped-def]
    """Make a function that searches once."""
    log_probs = torch.randn(K, M, generator=generator).log_softmax(-1)
    first = torch.tensor([0])
    return lambda: beam_search(lambda tokens, _: (log_probs[: len(tokens)], None), None, first, beams=K, max_length=T)


def cost_exponent(costs: Sequence[Cost], axis: str) -> float:
    """Fit the exponent of the time over T K M log M, along one axis from its middle to its end; below 1: slower."""
    along = [cost for cost in costs if cost.axis == axis]
    middle, end = along[len(along) // 2], along[-1]
    return math.log(end.ms / middle.ms) / math.log(end.bound / middle.bound)


def claims_of(two: Sequence[tuple[str, float]], best: float, three: float, costs: Sequence[Cost]) -> list[study.Claim]:
    """Claim the example's numbers to its two digits, and the bound on the cost if it was measured."""
    first = beam_search(example_step, None, torch.tensor([0]), beams=2, max_length=1, n_best=2).log_probs[0]
    second = beam_search(example_step, None, torch.tensor([0]), beams=2, max_length=2, n_best=2).log_probs[0]
    reached = [*first.tolist(), *second.tolist(), two[0][1], two[1][1], best]
    printed = (-0.65, -0.73, -1.25, -1.33, -1.85, -1.93, -1.46)
    error = max(abs(a - b) for a, b in zip(reached, printed, strict=True))
    claims = [
        study.Claim("largest distance from the example's printed numbers", error, "<=", 1e-4),
        study.Claim("two beams: log p lost against the optimum", best - two[0][1], ">=", 0.38),
        study.Claim("three beams: log p lost against the optimum", best - three, "<=", 1e-6),
    ]
    claims.extend(
        study.Claim(f"exponent of the time over T K M log M, along {axis}", cost_exponent(costs, axis), "<=", 1.15)
        for axis in (AXES if costs else ())
    )
    return claims


def draw(costs: Sequence[Cost]) -> Figure:
    """Draw the tree of the example, and time over the bound along each axis if it was measured."""
    if not costs:
        figure = figures.new_figure(8, 6)
        _draw_tree(figure.subplots())
        return figure
    figure = figures.new_figure(13, 6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_tree(left)
    for (axis, values), color, marker in zip(
        AXES.items(), (figures.BLUE, figures.ORANGE, figures.GREEN), "os^", strict=True
    ):
        along = [cost for cost in costs if cost.axis == axis]
        label = f"{axis} = {values[0]} to {values[-1]}"
        right.plot([c.bound for c in along], [c.ms for c in along], marker + "-", color=color, label=label)
    last = max(costs, key=lambda cost: cost.bound)
    line = [min(cost.bound for cost in costs), last.bound]
    right.plot(line, [last.ms * x / last.bound for x in line], ":", color=figures.GREY, label="proportional")
    right.legend(frameon=False)
    right.set(xscale="log", yscale="log", xlabel="T K M log M", ylabel="time of a search (ms)")
    right.set_title(f"Cost; what is not varied is T = {MIDDLE['T']}, K = {MIDDLE['K']}, M = {MIDDLE['M']}")
    figures.add_grid(right)
    return figure


def _draw_tree(axes) -> None:  # type: ignore[no-untyped-def]
    """Draw every text of the example at its log p: what two beams keep, what they drop, and the optimum."""
    kept: set[tuple[int, ...]] = {()}
    alive: list[tuple[int, ...]] = [()]
    score: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(STEPS):
        extended = [(*text, word) for text in alive for word in range(len(WORDS))]
        for text in [(*text, word) for text in score for word in range(len(WORDS)) if (*text, word) not in score]:
            score[text] = score[text[:-1]] + EXAMPLE[text[:-1]][text[-1]]
        alive = sorted(extended, key=lambda text: -score[text])[:2]
        kept.update(alive)
    best = max((text for text in score if len(text) == STEPS), key=lambda text: score[text])
    for text, value in score.items():
        if not text:
            continue
        on_best, is_kept = best[: len(text)] == text, text in kept
        color = figures.BLUE if is_kept else figures.ORANGE if on_best else figures.GREY
        style = {
            "color": color,
            "linewidth": 2 if is_kept or on_best else 0.8,
            "alpha": 1 if is_kept or on_best else 0.5,
        }
        axes.plot((len(text) - 1, len(text)), (score[text[:-1]], value), "o-", **style)
        if len(text) < STEPS or text == best or is_kept:
            name = WORDS[text[-1]] if len(text) < STEPS else " ".join(WORDS[word] for word in text)
            axes.annotate(
                f"{name} {value:.2f}",
                (len(text), value),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )
    axes.plot([], [], color=figures.BLUE, linewidth=2, label="kept by two beams")
    axes.plot([], [], color=figures.ORANGE, linewidth=2, label="the optimum, dropped at step 2")
    axes.plot([], [], color=figures.GREY, linewidth=0.8, label="dropped")
    axes.set(xlabel="step", ylabel="log p of the text so far", xlim=(-0.1, STEPS + 1.2), ylim=(-2.5, 0.1))
    axes.set_xticks(range(STEPS + 1))
    axes.set_title("The worked example")
    axes.legend(frameon=False, loc="lower left")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study beam`."""
    study.add_common_arguments(parser, "beam")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of timing along each axis; 0 for none (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Search, time, print, draw."""
    study.require_matplotlib()
    two, (three, _) = search_example(2), search_example(3)
    best_text, best = exhaustive(example_step, len(WORDS), STEPS)
    costs = measure_costs(args.seconds, args.seed) if args.seconds > 0 else []
    rows = [("greedy", *search_example(1)[0]), *(("2 beams", *one) for one in two), ("3 beams", *three)]
    rows.append(("exhaustive", " ".join(WORDS[word] for word in best_text), best))
    text = text_table(("search", "text", "log p"), rows)
    if costs:
        text += "\n\nTime of a search\n" + text_table(
            ("T", "K", "M", "ms", "ns per T K M log M"),
            [(cost.T, cost.K, str(cost.M), cost.ms, cost.ms * 1e6 / cost.bound) for cost in costs],
        )
    return study.finish("beam", text, claims_of(two, best, three[1], costs), draw(costs), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "beam", *sys.argv[1:]]))
