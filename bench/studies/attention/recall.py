"""Looking things up in a context: what fits into a state of a given size?

Multi-query associative recall: a sequence lists P pairs of a key and a value, then asks for keys, each once, in any
order and at any distance; the answer to each is its value.

    k1 v1 k2 v2 ... kP vP  .  k2?  .  .  k7?  .  k1? ...        N tokens in all, "." says nothing

Softmax keeps every key and value, so it can always look. A linear form keeps sums of a fixed size, and what it can tell
apart is bounded by that size. Here every kernel is trained on all difficulties at once and tested on each; the head
size D sets the size of the state. The models are small: a short causal convolution, which lets a value know the key
before it, then two layers of one head. No positions: recall needs none.

Source: Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language models".
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linattn._util import figures
from linattn._util.argtypes import whole
from linattn._util.environment import describe, pick_device
from linattn._util.files import write_json
from linattn._util.tables import text_table
from linattn.bench.studies.common import study
from linattn.bench.studies.common.sweep import RESULTS_NAME, sweep
from linattn.decode import KeyCache
from linattn.modules import Transformer
from linattn.training.checkpoint import CHECKPOINT_NAME, read_checkpoint
from linattn.training.trainer import Trainer, TrainingConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

SYMBOLS = 64  # different keys, and as many values
NOTHING = 2 * SYMBOLS
TOKENS_A_STEP = 2048
TEST_SEQUENCES = 128
RUNS_NAME = "runs.json"  # of all runs together
TEST_SEED = 10_000  # far from the seeds to train with
KERNELS = (
    "softmax",
    "quadratic",
    "taylor",
    "elu+1",
    "relu2",
    "exp",
    "softmax-features",
    "dpfp",
    "favor+",
    "hedgehog",
    "quadratic,softmax",
)
COLORS = (
    *(figures.BLACK, figures.BLUE, figures.SKY, figures.GREEN, figures.LIME, figures.GREY),
    *(figures.LIGHT_GREY, figures.ORANGE, figures.VERMILION, figures.PURPLE, figures.WINE),
)


class Cell(NamedTuple):
    """One difficulty: P pairs in N tokens."""

    pairs: int
    length: int


CELLS = tuple(Cell(N // part, N) for N in (64, 128, 256) for part in (16, 8, 4))


@dataclass(frozen=True)
class RecallSettings:
    """The settings that decide the outcome of a run."""

    kernel: str
    head_dim: int
    seed: int
    steps: int
    dim: int = 64
    layers: int = 2
    lr: float = 1e-2


class RecallModel(nn.Module):
    """Tokens int64 [B, T] -> logits over the values [B, T, SYMBOLS]."""

    def __init__(self, settings: RecallSettings) -> None:
        super().__init__()
        dim, kernel = settings.dim, settings.kernel.split(",")
        self.embedding = nn.Embedding(2 * SYMBOLS + 1, dim)
        self.shift = nn.Conv1d(dim, dim, kernel_size=3, groups=dim, padding=2)
        self.transformer = Transformer(
            settings.layers, dim, heads=1, head_dim=settings.head_dim, kernel=kernel, is_causal=True, qk_norm=True
        )
        self.head = nn.Linear(dim, SYMBOLS, bias=False)

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Return the logits `[B, T, SYMBOLS]` of tokens `[B, T]`."""
        x = self.embedding(tokens)
        x = x + self.shift(x.mT)[..., : x.shape[1]].mT
        logits: Tensor = self.head(self.transformer(x, cache=cache))
        return logits

    @torch.no_grad()
    def state_bytes(self, length: int) -> int:
        """Return what decoding has to keep after `length` tokens, all layers: keys and values for softmax, else the
        state.
        """
        cache = self.transformer.decode_cache()
        for layer in cache.layers:
            if isinstance(layer, KeyCache):
                layer.fold_at = 1  # the state is what is compared here, even where fewer keys would take less room
        x = torch.zeros(1, length, self.embedding.embedding_dim, device=self.embedding.weight.device)
        self.transformer(x, cache=cache)
        return sum(x.nbytes for layer in cache.layers for x in layer.state_dict().values() if torch.is_tensor(x))


def draw_sequences(cell: Cell, count: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw sequences int64 [count, N] and answers int64 [count, N], -100 where nothing is asked; of the arguments
    alone.
    """
    P, N = cell
    random = np.random.default_rng((seed, step))
    tokens = np.full((count, N), NOTHING)
    answers = np.full((count, N), -100)
    keys = random.random((count, SYMBOLS)).argsort(1)[:, :P]
    values = random.integers(SYMBOLS, size=(count, P))
    tokens[:, 0 : 2 * P : 2], tokens[:, 1 : 2 * P : 2] = keys, values + SYMBOLS
    asked = 2 * P + random.random((count, N - 2 * P)).argsort(1)[:, :P]
    np.put_along_axis(tokens, asked, keys, 1)
    np.put_along_axis(answers, asked, values, 1)
    return torch.from_numpy(tokens), torch.from_numpy(answers)


def accuracy(model: RecallModel, cell: Cell, device: torch.device) -> float:
    """Measure the share of the questions answered rightly on fresh sequences."""
    tokens, answers = draw_sequences(cell, TEST_SEQUENCES, seed=TEST_SEED, step=CELLS.index(cell))
    guesses = model(tokens.to(device)).argmax(-1).cpu()
    asked = answers >= 0
    return float((guesses[asked] == answers[asked]).double().mean())


def train(settings: RecallSettings, folder: Path, device: torch.device) -> bool:
    """Train one run, from its checkpoint if there is one; False when it was interrupted."""
    torch.manual_seed(settings.seed)
    model = RecallModel(settings).to(device)

    def loss_on(cell: Cell, seed: int, step: int) -> Tensor:
        tokens, answers = draw_sequences(cell, TOKENS_A_STEP // cell.length, seed=seed, step=step)
        return F.cross_entropy(model(tokens.to(device)).flatten(0, 1), answers.to(device).flatten())

    trainer = Trainer(
        model,
        lambda step: loss_on(CELLS[step % len(CELLS)], settings.seed, step),
        lambda: statistics.fmean(loss_on(cell, TEST_SEED + 1, i).item() for i, cell in enumerate(CELLS)),
        TrainingConfig(steps=settings.steps, learning_rate=settings.lr, validate_every=max(1, settings.steps // 4)),
        folder=folder,
        settings=asdict(settings),
        show_progress=False,  # several runs share the terminal
    )
    path = folder / CHECKPOINT_NAME
    if path.is_file():
        trainer.restore(read_checkpoint(path), path)
    if not trainer.run():
        return False
    model.eval()
    with torch.no_grad():
        found = {f"{cell.pairs} of {cell.length}": accuracy(model, cell, device) for cell in CELLS}
    results = {
        "settings": asdict(settings),
        "accuracy": found,
        "state_bytes": {str(N): model.state_bytes(N) for N in sorted({cell.length for cell in CELLS})},
        "seconds": round(trainer.seconds, 1),
        "environment": asdict(describe(device)),
    }
    write_json(folder / RESULTS_NAME, results, indent=2)
    return True


def train_one(plan: Mapping[str, RecallSettings], device: torch.device, name: str, folder: Path) -> bool:
    """Train the run of that name."""
    return train(plan[name], folder, device)


def accuracies(results: Sequence[Mapping[str, Any]], kernel: str, head_dim: int, cell: Cell) -> list[float]:
    """Collect the accuracy of every seed."""
    return [
        r["accuracy"][f"{cell.pairs} of {cell.length}"]
        for r in results
        if r["settings"]["kernel"] == kernel and r["settings"]["head_dim"] == head_dim
    ]


def claims_of(results: Sequence[Mapping[str, Any]], kernels: Sequence[str], sizes: Sequence[int]) -> list[study.Claim]:
    """Claim that softmax looks everything up at any head size; of the others the smallest states do not."""
    hardest, small, large = CELLS[-1], min(sizes), max(sizes)
    what = f"{hardest.pairs} pairs in {hardest.length} tokens, accuracy"
    claims = []
    if "softmax" in kernels:
        softmax = min(accuracies(results, "softmax", small, hardest))
        claims.append(study.Claim(f"{what}: softmax, D = {small}, worst seed", softmax, ">=", 0.95))
    for kernel in ("elu+1", "quadratic") if large > small else ():
        if kernel in kernels:
            least, most = (max(accuracies(results, kernel, D, hardest)) for D in (small, large))
            text = f"{what}: {kernel}, D = {large} more than D = {small}"
            claims += [
                study.Claim(f"{what}: {kernel}, D = {small}, best seed", least, "<=", 0.8),
                study.Claim(text, most - least, ">", 0.2),
            ]
    return claims


def state_bytes(results: Sequence[Mapping[str, Any]], kernel: str, head_dim: int, cell: Cell) -> int:
    """Return the size of the state, the same for all seeds."""
    return next(
        int(r["state_bytes"][str(cell.length)])
        for r in results
        if r["settings"]["kernel"] == kernel and r["settings"]["head_dim"] == head_dim
    )


def learned(accuracy: float, cell: Cell) -> bool:
    """Say whether a run reached clearly more than naming any of the values shown, which is the plateau that training
    has to leave first.
    """
    return accuracy > 1.5 / cell.pairs


def untrained(results: Sequence[Mapping[str, Any]], kernels: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Count, by kernel and head size, the seeds that never left the plateau: they say nothing of memory."""
    names = []
    for kernel in kernels:
        for D in sizes:
            found = accuracies(results, kernel, D, CELLS[0])
            lost = sum(not learned(one, CELLS[0]) for one in found)
            names += [f"{kernel} D={D} ({lost} of {len(found)})"] if lost else []
    return names


def table(results: Sequence[Mapping[str, Any]], kernels: Sequence[str], sizes: Sequence[int]) -> str:
    """Format the accuracy in percent: one row a kernel and head size, one column a difficulty; the best seed, and the
    others.
    """
    rows = []
    for kernel in kernels:
        for D in sizes:
            found = [accuracies(results, kernel, D, cell) for cell in CELLS]
            state = state_bytes(results, kernel, D, CELLS[-1]) / 1024
            others = " ".join(f"{100 * one:.1f}" for one in sorted(found[-1])[:-1])
            rows.append((kernel, D, state, *(100 * max(seeds) for seeds in found), others))
    hardest = "{}/{}".format(*CELLS[-1])
    header = ("kernel", "D", f"KiB at N={CELLS[-1].length}", *(f"{P}/{N}" for P, N in CELLS), f"{hardest}, other seeds")
    lost = ", ".join(untrained(results, kernels, sizes)) or "none"
    return (
        f"Accuracy (%) by pairs/length, best seed\n{text_table(header, rows)}\n\n"
        f"seeds that do no better than name any of the values shown ({CELLS[0].pairs}/{CELLS[0].length}): {lost}"
    )


def draw(results: Sequence[Mapping[str, Any]], kernels: Sequence[str], sizes: Sequence[int]) -> Figure:
    """Draw accuracy against state size, one panel a difficulty: more pairs to the right, longer sequences below.

    Lines join the best seeds, since what a state can hold is asked; pale dots are the other seeds, crosses models of
    which no seed left the plateau.
    """
    lengths = sorted({cell.length for cell in CELLS})
    figure = figures.new_figure(13, 10)
    grid = figure.subplots(len(lengths), len(CELLS) // len(lengths), sharex=True, sharey=True, squeeze=False)
    for axes, cell in zip(grid.flat, CELLS, strict=True):
        for index, kernel in enumerate(kernels):
            color = COLORS[index % len(COLORS)]
            points = sorted((state_bytes(results, kernel, D, cell) / 1024, D) for D in sizes)
            found = {size: sorted(accuracies(results, kernel, D, cell)) for size, D in points}
            axes.plot(
                list(found),
                [100 * seeds[-1] for seeds in found.values()],
                linestyle="--" if "," in kernel else "-",
                color=color,
                label=kernel.replace(",", " + "),
            )
            for size, D in points:
                trained = learned(max(accuracies(results, kernel, D, CELLS[0])), CELLS[0])
                axes.plot(
                    size, 100 * found[size][-1], "o" if trained else "x", color=color, markersize=4 if trained else 6
                )
                for one in found[size][:-1]:
                    axes.plot(size, 100 * one, ".", color=color, alpha=0.4)
        axes.set(xscale="log", ylim=(-3, 103), title=f"{cell.pairs} pairs in {cell.length} tokens")
        figures.add_grid(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("answers that are right (%)")
    for axes in grid[-1]:
        axes.set_xlabel("state of both layers (KiB)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title="kernel")
    figure.suptitle("Lines: best seed; pale dots: other seeds; crosses: no seed does better than naming a value shown")
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn study recall`."""
    study.add_common_arguments(parser, "recall")
    parser.add_argument("--seeds", type=whole, default=2, help="runs with seeds from --seed on (%(default)s)")
    parser.add_argument("--steps", type=whole, default=1000, help="of training for each run (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (%(default)s)")
    parser.add_argument(
        "--kernels", type=lambda text: text.split(), default=list(KERNELS), help="separated by spaces (all)"
    )
    parser.add_argument(
        "--sizes",
        type=lambda text: [whole(word) for word in text.split(",")],
        default=[8, 16, 32, 64],
        help="head sizes D, separated by commas (8,16,32,64)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    parser.add_argument(
        "--workers", type=whole, default=os.cpu_count() or 1, help="processes side by side (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Train what is missing, print, draw."""
    study.require_matplotlib()
    device = pick_device(args.device)
    plan = {
        f"{kernel.replace(',', '-')}-D{D}-seed{seed}": RecallSettings(kernel, D, seed, args.steps, lr=args.lr)
        for seed in range(args.seed, args.seed + args.seeds)
        for kernel in args.kernels
        for D in args.sizes
    }
    runs = {name: asdict(settings) for name, settings in plan.items()}
    found = sweep(runs, args.out, partial(train_one, plan, device), args.workers)
    write_json(args.out / RUNS_NAME, found)
    results = list(found.values())
    text = table(results, args.kernels, args.sizes)
    text += f"\n\n{len(results)} runs, {sum(r['seconds'] for r in results) / 60:.0f} minutes of training"
    claims = claims_of(results, args.kernels, args.sizes)
    return study.finish("recall", text, claims, draw(results, args.kernels, args.sizes), args)


if __name__ == "__main__":
    from linattn.cli.main import main

    sys.exit(main(["study", "recall", *sys.argv[1:]]))
