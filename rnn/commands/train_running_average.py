"""`linattn train running-average`: recurrent networks learn the mean of what they have seen so far.

What it leaves in its folder: `results.json`, `figure.png`, and for each run a folder with `checkpoint.pt` and
`history.jsonl`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn._util import figures
from linattn._util.environment import describe
from linattn._util.files import write_json
from linattn._util.tables import text_table
from linattn.rnn.commands.common import add_counts, add_run_arguments, mean_and_sd, require_matplotlib
from linattn.rnn.heads import RecurrentRegressionModel
from linattn.rnn.layers import RecurrentLayer
from linattn.rnn.stacks import LSTM, RNN
from linattn.rnn.tasks.running_average import running_average_batch, running_average_loss
from linattn.training.resume import train_or_resume
from linattn.training.trainer import Record, Trainer, TrainingConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

CELLS = ("lstm", "rnn")
TARGETS = ("all", "last")
NOTED = ("hidden", "batches", "batch", "steps", "lr", "recurrent_weights", "seeds")
"""Options that the result file names."""
LAST_BATCHES = 100
VALIDATION_SEED, VALIDATION_BATCH = 2**40, 4096
SHOWN = 3
"""Sequences in the figure of predictions."""


@dataclass(frozen=True)
class Run:
    """One trained network.

    Attributes:
        targets: "all" steps count in the loss, or the "last" alone.
        training: mean loss of the last 100 batches.
        validation: loss on 4,096 sequences never trained on, at the end.
    """

    cell: str
    layers: int
    targets: str
    seed: int
    training: float
    validation: float
    seconds: float
    history: list[Record]

    @property
    def name(self) -> str:
        """Name of the network, as tables and figures show it."""
        return name_of(self.cell, self.layers)


def name_of(cell: str, layers: int) -> str:
    """Name a network by its cell and depth."""
    return f"{cell.upper()}, {layers} layer{'s' if layers > 1 else ''}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the networks, the targets, and their training."""
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["rnn", "lstm"], help="(rnn lstm)")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2], help="numbers of layers (1 2)")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="steps in the loss (all last)"
    )
    counts = (
        ("hidden", 32, "width of every layer"),
        ("batches", 5000, "optimiser steps"),
        ("batch", 32, "sequences in a batch"),
        ("steps", 10, "length of a sequence, T"),
    )
    add_counts(parser, counts)
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of Adam (%(default)s)")
    parser.add_argument(
        "--recurrent-weights", choices=("orthogonal", "uniform"), default="orthogonal", help="as drawn (%(default)s)"
    )
    add_run_arguments(parser, "running-average")


def run(args: argparse.Namespace) -> int:
    """Train every network for every seed, print the table of losses, draw."""
    require_matplotlib()
    runs: list[Run] = []
    models: dict[tuple[str, str], RecurrentRegressionModel] = {}
    for targets, layers, cell, seed in product(args.targets, args.layers, args.cells, args.seeds):
        trained = train_one(cell, layers, targets, seed, args)
        if trained is None:
            return 130
        one, model = trained
        print(f"{one.name}, {targets} targets, seed {seed}: {one.validation:.2g} after {one.seconds:.0f} s", flush=True)
        runs.append(one)
        models.setdefault((one.name, targets), model)
    rows = summary(runs)
    results = {
        "settings": {name: getattr(args, name) for name in NOTED},
        "unit": "mean squared error; predicting 0 costs (1 + 1/2 + ... + 1/T) / T on all targets, 1/T on the last",
        "summary": rows,
        "runs": [asdict(one) for one in runs],
        "environment": asdict(describe(torch.device("cpu"))),
    }
    write_json(args.out / "results.json", results)
    figures.save(draw(runs, models, args.steps), args.out / "figure.png")
    header = ("network", "targets", "last 100 batches", "sd", "4096 fresh sequences", "sd", "worst seed")
    print(text_table(header, [tuple(row.values()) for row in rows]))
    print(f"\nmean squared errors, seeds {args.seeds}; results and figure in {args.out}")
    return 0


def train_one(
    cell: str, layers: int, targets: str, seed: int, args: argparse.Namespace
) -> tuple[Run, RecurrentRegressionModel] | None:
    """Train one network; None when interrupted."""
    torch.manual_seed(seed)
    net = LSTM(1, args.hidden, layers) if cell == "lstm" else RNN(1, args.hidden, layers)
    if args.recurrent_weights == "orthogonal":
        for layer in net.modules():
            if isinstance(layer, RecurrentLayer):
                layer.draw_orthogonal()
    model = RecurrentRegressionModel(net)
    generator = torch.Generator()

    def loss_on(batch: int, data_seed: int) -> Tensor:
        x, y = running_average_batch(args.steps, batch, generator=generator.manual_seed(data_seed))
        return running_average_loss(model(x)[0], y, last_timestep_only=targets == "last")

    def loss(step: int) -> Tensor:
        return loss_on(args.batch, seed * 2**20 + step)

    settings = {"cell": cell, "layers": layers, "targets": targets, "seed": seed}
    settings |= {name: getattr(args, name) for name in ("hidden", "batch", "steps", "lr", "recurrent_weights")}
    trainer = Trainer(
        model,
        loss,
        lambda: loss_on(VALIDATION_BATCH, VALIDATION_SEED).item(),
        TrainingConfig.adam(steps=args.batches, learning_rate=args.lr, validate_every=min(LAST_BATCHES, args.batches)),
        folder=args.out / f"{cell}{layers}-{targets}-{seed}",
        settings=settings,
    )
    if not train_or_resume(trainer, args):
        return None
    end = trainer.history[-1]
    training = math.nan if end.train_loss is None else end.train_loss
    return Run(cell, layers, targets, seed, training, end.validation_loss, end.seconds, trainer.history), model


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Compute mean and standard deviation over the seeds of each network."""
    rows = []
    for name, targets in dict.fromkeys((one.name, one.targets) for one in runs):
        of = [one for one in runs if (one.name, one.targets) == (name, targets)]
        fresh = [one.validation for one in of]
        training, training_sd = mean_and_sd([one.training for one in of])
        validation, validation_sd = mean_and_sd(fresh)
        rows.append(
            {
                "network": name,
                "targets": targets,
                "training": training,
                "training_sd": training_sd,
                "validation": validation,
                "validation_sd": validation_sd,
                "validation_worst": max(fresh),
            }
        )
    return rows


def draw(runs: Sequence[Run], models: dict[tuple[str, str], RecurrentRegressionModel], steps: int) -> Figure:
    """Draw loss over training for each kind of targets, and predictions of the best network beside the truth."""
    kinds = list(dict.fromkeys(one.targets for one in runs))
    figure = figures.new_figure(5.2 * (len(kinds) + 1), 4.4)
    panels = figure.subplots(1, len(kinds) + 1)
    names = list(dict.fromkeys(one.name for one in runs))
    for axes, targets in zip(panels, kinds, strict=False):
        for one in runs:
            if one.targets == targets:
                first = one.seed == runs[0].seed
                axes.plot(
                    [record.step for record in one.history],
                    [record.validation_loss for record in one.history],
                    color=figures.PALETTE[names.index(one.name) % len(figures.PALETTE)],
                    linewidth=1.2,
                    alpha=1 if first else 0.45,
                    label=one.name if first else None,
                )
        what = "all steps count" if targets == "all" else "the last step counts"
        axes.set(title=f"Running average: {what}", xlabel="optimiser steps", yscale="log")
        figures.add_grid(axes)
        axes.legend()
    panels[0].set_ylabel("mean squared error on fresh sequences")
    best = min((one for one in runs if one.targets == kinds[0]), key=lambda one: one.validation)
    x, y = running_average_batch(steps, SHOWN, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        predictions, _ = models[best.name, kinds[0]](x)
    axes = panels[-1]
    at = range(1, steps + 1)
    for row in range(SHOWN):
        label = row == 0
        axes.plot(at, x[row, :, 0], ".", color=figures.PALETTE[row], alpha=0.35, label="input" if label else None)
        axes.plot(at, y[row, :, 0], color=figures.PALETTE[row], label="mean so far" if label else None)
        axes.plot(at, predictions[row, :, 0], "x", color=figures.PALETTE[row], label=best.name if label else None)
    axes.set(title=f"{SHOWN} sequences never trained on", xlabel="step t", ylabel="value")
    figures.add_grid(axes)
    axes.legend()
    return figure
