"""Measure what each kernel learns of a text: character language models that differ in their attention only.

One budget for all: the same number of optimiser steps, hence the same characters read, with the same model, learning
rate and data order. Wall time is shown beside it, for kernels differ in speed. A run is a run of `linattn train lm`
and can be looked at with `linattn runs` and `linattn generate`; runs that are finished are kept, one that was
interrupted goes on from its checkpoint.

    main      first text, the shorter context, several seeds
    long      first text, a context eight times as long with as many characters in a step, one seed
    second    every other text that is given, the shorter context, one seed

`--full` is the same study for a GPU: every kernel, a larger model, longer contexts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.bench.studies.common.sweep import sweep
from linattn.errors import DataError
from linattn.lm import train
from linattn.training.checkpoint import CHECKPOINT_NAME
from linattn.training.compare_runs import Run, find

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HYBRID = "quadratic,quadratic,quadratic,softmax"
COLORS = (
    figures.GREY,
    figures.BLUE,
    figures.SKY,
    figures.GREEN,
    figures.ORANGE,
    figures.VERMILION,
    figures.PURPLE,
    figures.BLACK,
    figures.OLIVE,
    figures.LIME,
    figures.LIGHT_GREY,
)


@dataclass(frozen=True)
class Budget:
    """The settings that every run of a study shares.

    Attributes:
        characters: of a step, whatever the context. validations: over the run, the last one at its end.
    """

    kernels: tuple[str, ...]
    layers: int
    dim: int
    heads: int
    context: int
    long_context: int
    characters: int
    steps: int
    lr: float
    validations: int


# 0.8 million parameters; minutes a run on two cores.
SMALL = Budget(
    ("softmax", "quadratic", "taylor", "elu+1", HYBRID), 4, 128, 2, 256, 2048, characters=2048, steps=800, lr=4e-3,
    validations=8,
)  # fmt: skip
# 25 million parameters; for a GPU.
FULL = Budget(
    (*SMALL.kernels, "relu2", "exp", "softmax-features", "dpfp", "favor+", "hedgehog"), 8, 512, 8, 1024, 8192,
    characters=32768, steps=5000, lr=1e-3, validations=25,
)  # fmt: skip
# To see that all works.
QUICK = Budget(
    ("softmax", "elu+1"), 2, 32, 2, 16, 32, characters=128, steps=20, lr=4e-3, validations=2
)  # fmt: skip


def short(kernel: str) -> str:
    """Return a kernel's name for tables and folders."""
    return "hybrid" if kernel == HYBRID else kernel.replace(",", "-")


def plan_runs(budget: Budget, texts: Sequence[Path], seed: int, seeds: int, device: str) -> dict[str, dict[str, Any]]:
    """Return the settings of `linattn train lm` for each run, by the run's name."""
    groups = [(texts[0], budget.context, seeds), (texts[0], budget.long_context, 1)]
    groups += [(text, budget.context, 1) for text in texts[1:]]
    plan = {}
    # Seed by seed, so that a study cut short has whole rows.
    for own in range(seed, seed + seeds):
        for text, context, wanted in groups:
            for kernel in budget.kernels if own < seed + wanted else ():
                plan[f"{text.stem}-{context}-{short(kernel)}-seed{own}"] = {
                    "text": str(text),
                    "kernel": kernel,
                    "layers": budget.layers,
                    "dim": budget.dim,
                    "heads": budget.heads,
                    "context": context,
                    "batch": max(1, budget.characters // context),
                    "steps": budget.steps,
                    "lr": budget.lr,
                    "validate_every": -(-budget.steps // budget.validations),
                    "seed": own,
                    "device": device,
                }
    return plan


def train_run(options: Mapping[str, Any], folder: Path) -> bool:
    """Train one run of `linattn train lm`, from its checkpoint if there is one; False when it was interrupted."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = ["--out", str(folder), "--no-figure"]
    if (folder / CHECKPOINT_NAME).is_file():
        words += ["--resume", "--text", options["text"]]
    else:
        words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return train.run(parser.parse_args(words)) == 0


@dataclass(frozen=True)
class RunOutcome:
    """A run as it ended.

    Attributes:
        loss: validation, in nats per character, at the end. trigram: of the same text.
    """

    kernel: str
    text: str
    context: int
    seed: int
    loss: float
    trigram: float
    minutes: float
    steps: int
    run: Run


def outcomes_of(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[RunOutcome]:
    """Read what the runs left behind."""
    histories = {run.name: run for run in find(folder)}
    return [
        RunOutcome(
            r["settings"]["kernel"],
            r["settings"]["text"],
            r["settings"]["context"],
            r["settings"]["seed"],
            r["validation_loss"],
            r["trigram_validation_loss"],
            r["seconds"] / 60,
            r["steps"],
            histories[name],
        )
        for name, r in results.items()
    ]


def group_seeds(outcomes: Sequence[RunOutcome]) -> dict[tuple[str, int], dict[str, list[RunOutcome]]]:
    """Group the seeds by text and context, then by kernel."""
    groups: dict[tuple[str, int], dict[str, list[RunOutcome]]] = {}
    for one in outcomes:
        groups.setdefault((one.text, one.context), {}).setdefault(one.kernel, []).append(one)
    return groups


def table(outcomes: Sequence[RunOutcome]) -> str:
    """Format one line a group and kernel."""
    rows = []
    for (text, context), kernels in group_seeds(outcomes).items():
        for kernel, runs in kernels.items():
            losses = [one.loss for one in runs]
            spread = f"{max(losses) - min(losses):.3f}" if len(losses) > 1 else "one seed"
            minutes = statistics.fmean(one.minutes for one in runs)
            mean = statistics.fmean(losses)
            rows.append((text, context, short(kernel), f"{mean:.3f}", spread, runs[0].trigram - mean, minutes))
    header = ("text", "context", "kernel", "loss", "max - min", "below the trigram", "minutes a run")
    return "Validation loss in nats per character, mean over seeds\n" + text_table(header, rows)


def claims_of(outcomes: Sequence[RunOutcome]) -> list[study.Claim]:
    """Claim that softmax beats the trigram in every group, and by far in the first one, or the setting is wrong."""
    softmax = [runs["softmax"] for runs in group_seeds(outcomes).values() if "softmax" in runs]
    if not softmax:
        return []
    leads = [min(one.trigram - one.loss for one in runs) for runs in softmax]
    what = "lead of softmax over the trigram (nats per character)"
    return [
        study.Claim(f"smallest {what}, first group", leads[0], ">=", 0.2),
        study.Claim(f"smallest {what}, all groups", min(leads), ">=", 0.1),
    ]


def draw(outcomes: Sequence[RunOutcome], budget: Budget) -> Figure:
    """Draw the first group's curves against steps and minutes, and where every group ended."""
    groups = group_seeds(outcomes)
    colors = {kernel: COLORS[i % len(COLORS)] for i, kernel in enumerate(budget.kernels)}
    figure = figures.new_figure(15, 5)
    by_step, by_time, ends = figure.subplots(1, 3)
    (text, context), kernels = next(iter(groups.items()))
    for kernel, runs in kernels.items():
        for axes, unit in ((by_step, "step"), (by_time, "seconds")):
            _curve(axes, [one.run for one in runs], unit, colors[kernel], short(kernel))
    last = [one.loss for runs in kernels.values() for one in runs]
    trigram = next(iter(kernels.values()))[0].trigram
    for axes, label in ((by_step, "optimiser steps"), (by_time, "wall time of training (minutes, mean over seeds)")):
        axes.axhline(trigram, color="black", linestyle="--", label=f"trigram {trigram:.3f}")
        axes.set(xlabel=label, title=f"{text}, context {context}", ylim=(min(last) - 0.05, trigram + 0.5))
        figures.add_grid(axes)
    by_step.set_ylabel("validation loss (nats per character)")
    by_step.legend(fontsize=9)
    for place, kernels in enumerate(groups.values()):
        for index, (kernel, runs) in enumerate(kernels.items()):
            x = place + 0.12 * (index - (len(kernels) - 1) / 2)
            ends.plot([x] * len(runs), [one.loss for one in runs], "o", color=colors[kernel], markersize=5)
        trigram = next(iter(kernels.values()))[0].trigram
        ends.plot([place - 0.4, place + 0.4], [trigram, trigram], "--", color="black")
    ends.set_xticks(range(len(groups)), [f"{Path(text).stem}\ncontext {context}" for text, context in groups])
    ends.set(title="At the end, each seed a point; dashed: trigram", xlim=(-0.6, len(groups) - 0.4))
    figures.add_grid(ends, axis="y")
    return figure


def _curve(axes: Axes, runs: Sequence[Run], unit: str, color: str, label: str) -> None:
    """Draw the mean over seeds, and the band between the smallest and the largest."""
    records = list(zip(*(run.history for run in runs), strict=True))
    x = [statistics.fmean(getattr(r, unit) for r in same) / (60 if unit == "seconds" else 1) for same in records]
    losses = [[r.validation_loss for r in same] for same in records]
    axes.plot(x, [statistics.fmean(same) for same in losses], color=color, label=label)
    axes.fill_between(x, [min(same) for same in losses], [max(same) for same in losses], color=color, alpha=0.2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study lm`."""
    study.add_common_arguments(parser, "lm")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE", help="UTF-8 text; repeat it for more texts"
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="every kernel, a larger model, longer contexts: for a GPU")
    extent.add_argument("--quick", action="store_true", help="tiny models for a few seconds, to see that all works")
    parser.add_argument("--seeds", type=whole, default=3, help="of the main group (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train what is missing, print, draw."""
    study.require_matplotlib()
    if not args.text:
        raise DataError("no text was given; accepted: --text FILE, once or more, plain text files in UTF-8")
    budget = FULL if args.full else QUICK if args.quick else SMALL
    plan = plan_runs(budget, args.text, args.seed, args.seeds, args.device)
    # What a run's results say of itself: the text by its name alone.
    settings = {name: {**options, "text": Path(options["text"]).name} for name, options in plan.items()}
    found = sweep(settings, args.out, lambda name, folder: train_run(plan[name], folder))
    outcomes = outcomes_of(found, args.out)
    text = table(outcomes)
    text += f"\n\n{len(outcomes)} runs of {budget.steps} steps of {budget.characters} characters, "
    text += f"{sum(one.minutes for one in outcomes):.0f} minutes of training"
    return study.finish("lm", text, claims_of(outcomes), draw(outcomes, budget), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "lm", *sys.argv[1:]]))
