"""`linattn probe`: a linear classifier on the frozen codes of trained autoencoders, beside one on the raw samples."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linattn._util.argtypes import whole
from linattn._util.files import write_json
from linattn._util.tables import text_table
from linattn.autoencoders.analysis.probe import ProbeConfig, choose_labelled, probe_accuracy
from linattn.autoencoders.data.sets import check_labels
from linattn.autoencoders.experiments.train_command import load_run

if TYPE_CHECKING:
    from linattn.autoencoders.experiments.experiment import Experiment

RESULT_NAME = "probe.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the run, its data, and the probe, which defaults to the one used while the autoencoder was trained."""
    parser.add_argument("run", type=Path, help="folder of a run of `linattn train ae`")
    parser.add_argument("--data", metavar="PATH", help="folder of MNIST's files (default: the cache), or the .npz file")
    parser.add_argument("--download", action="store_true", help="fetch MNIST (11.6 MB) if it is not there")
    parser.add_argument("--labels", type=whole, default=argparse.SUPPRESS, help="labelled samples to learn from")
    parser.add_argument("--epochs", type=whole, default=argparse.SUPPRESS, help="passes over them")
    parser.add_argument("--batch", type=whole, default=argparse.SUPPRESS, help="samples in a step")
    parser.add_argument(
        "--lr", type=float, dest="learning_rate", default=argparse.SUPPRESS, help="learning rate of Adam"
    )
    parser.add_argument("--draws", type=whole, default=5, help="draws of the labelled samples (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Probe, print, and write `probe.json` into the folder of the run."""
    experiment = load_run(args.run, data=args.data, download=args.download, device=args.device)
    names = ("labels", "epochs", "batch", "learning_rate")
    config = replace(experiment.settings.probe, **{n: getattr(args, n) for n in names if hasattr(args, n)})
    result = probe_run(experiment, config, args.draws)
    rows = [(what, *_spread(result[what])) for what in ("codes", "raw samples")]
    labels = result["labelled samples"]
    print(f"accuracy on {len(experiment.data.test.y)} test samples, {labels} labels, {args.draws} draws of them (%)")
    print(text_table(("probe on", "mean", "lowest", "highest"), rows))
    write_json(args.run / RESULT_NAME, result, indent=2)
    return 0


def probe_run(experiment: Experiment, config: ProbeConfig, draws: int) -> dict[str, Any]:
    """Measure accuracies in per cent: a list over the draws, for codes of lists over the repeats.

    Raises:
        DataError: the set has no labels, or fewer than asked for.
    """
    data = experiment.data
    check_labels(data)
    codes, test_codes = experiment.codes(data.valid.x), experiment.codes(data.test.x)
    found: dict[str, Any] = {"probe": asdict(config), "codes": [], "raw samples": []}
    for draw in range(draws):
        seed = experiment.settings.seed + draw
        chosen = choose_labelled(data.valid, config.labels, seed)
        found["labelled samples"] = len(chosen)
        for name, x, test in (
            ("codes", codes[:, chosen], test_codes),
            ("raw samples", data.valid.x[chosen][None], data.test.x[None]),
        ):
            shares = probe_accuracy(x, data.valid.y[chosen], test, data.test.y, config, classes=data.classes, seed=seed)
            found[name].append((100 * shares).tolist())
    return found


def _spread(accuracies: list[list[float]]) -> tuple[float, float, float]:
    values = torch.tensor(accuracies)
    return values.mean().item(), values.min().item(), values.max().item()
