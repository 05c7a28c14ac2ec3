"""`linattn train ae`: train autoencoders on a set and show what they learned.

What a run leaves in its folder: `checkpoint.pt`, `history.jsonl` (one line a validation), `results.json`, `curve.png`,
`latent.png` and, for images, `reconstructions.png`, for fully connected models also `filters.png` and `spectrum.png`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linattn._util.argtypes import whole
from linattn._util.environment import describe, pick_device
from linattn._util.files import atomic_file
from linattn.autoencoders.experiments import options
from linattn.autoencoders.experiments.experiment import Experiment, parameter_count
from linattn.autoencoders.experiments.settings import OBJECTIVES, Settings
from linattn.errors import CheckpointError
from linattn.training import resume
from linattn.training.checkpoint import CHECKPOINT_NAME, read_checkpoint

if TYPE_CHECKING:
    from linattn.training.trainer import Record, Trainer

# What may differ between the sessions of one run: when it stops and where its data lie, not what is trained.
CHANGEABLE = {"epochs", "patience", "data", "download", "device"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare set, model and training. Absent options stay absent, so that presets and checkpoints can fill them in."""

    def add(name: str, kind: Any, text: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text, **more)

    options.add_set_arguments(parser)
    add("objective", str, f"{', '.join(OBJECTIVES)} (vanilla)")
    add("hidden", whole, "sizes of the encoder's layers; the last is the code's, k (256 32)", nargs="+")
    add("activation", str, "between layers: relu, tanh, sigmoid, gelu, identity (relu)")
    add("noise", float, "standard deviation for denoising (0.5)")
    add("mask", float, "share of entries, or of patches, hidden for masked (0.25)")
    add("patch", whole, "side of the patches for an attention encoder; --hidden is then its width")
    add("kernel", str, "attention of that encoder: softmax, quadratic, taylor or a feature map (quadratic)")
    add("layers", whole, "of that encoder (2)")
    add("heads", whole, "of that encoder (4)")
    add("loss", str, "sum over a sample's entries, or mean (sum)")
    add("epochs", whole, "passes over the training split (10; digits 60)")
    add("batch", whole, "samples in a step (mnist 200, synthetic 100, digits 50)")
    add("lr", float, "learning rate of Adam (5e-4)")
    add("validate-every", whole, "epochs between validations (1; digits 6)")
    add("patience", whole, "stop early after so many validations without a new lowest loss (never)")
    add("repeats", whole, "models trained side by side, each from a seed of its own (1)")
    add("seed", int, "of weights, order and corruption of the first repeat, and of the split (0)")
    add("labels", whole, "labelled samples for the probe at each validation (images 200, else all)")
    add("device", str, "auto, cpu, cuda, ... (auto)")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/ae-SET-OBJECTIVE)")
    resume.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, then write results and figures; 130 when interrupted."""
    given = resume.given_options(args, Settings)
    if "hidden" in given:
        given["hidden"] = tuple(given["hidden"])
    chosen = options.set_options(args)
    out: Path = args.out or Path("runs") / f"ae-{chosen['set']}-{given.get('objective', 'vanilla')}"
    path = out / CHECKPOINT_NAME
    checkpoint = resume.checkpoint_to_resume(path, args)
    if checkpoint is not None:
        settings, chosen = _resumed(checkpoint, given, args, path)
    else:
        if chosen["set"] not in options.PRESETS:
            options.open_set(chosen, 0)  # which says what is accepted
        settings = replace(options.PRESETS[chosen["set"]], **given)
        if hasattr(args, "labels"):
            settings = replace(settings, probe=replace(settings.probe, labels=args.labels))
    if not args.no_figure:
        options.require_matplotlib()

    data = options.open_set(chosen, settings.seed)
    samples = options.fingerprint(data)
    if checkpoint is not None and checkpoint["settings"]["samples"] != samples:
        raise CheckpointError(f"the checkpoint {path} was trained on other samples; accepted: the same set")
    device = pick_device(getattr(args, "device", "auto"))
    experiment = Experiment(settings, data.to(device))
    kept = {**chosen, "data": None, "download": False, "samples": samples, "environment": asdict(describe(device))}
    trainer = experiment.trainer(out, kept=kept, on_record=lambda record: _print_record(record, experiment))
    resume.begin(trainer, checkpoint, path, args)
    _print_heading(experiment)
    command = f"linattn train ae --out {out}"
    if not resume.train(trainer, f"{command} --resume"):
        return 130
    _finish(experiment, trainer, out, command, figures=not args.no_figure)
    return 0


def load_run(out: Path, *, data: str | None = None, download: bool = False, device: str = "auto") -> Experiment:
    """Load the experiment that `linattn train ae` left in a folder, with its set and the weights of its checkpoint.

    Args:
        out: the folder.
        data: where the set's files lie, if not in the cache.
        download: fetch them if they are not there.
        device: to load onto.

    Raises:
        CheckpointError: no checkpoint of an autoencoder is there, or the set is another one now.
        and what `load_set` raises.
    """
    path = out / CHECKPOINT_NAME
    checkpoint = read_checkpoint(path)
    settings = _settings_of(checkpoint, path)
    kept = checkpoint["settings"]
    chosen = {
        **{name: kept.get(name, value) for name, value in options.SET_DEFAULTS.items()},
        "data": data,
        "download": download,
    }
    found = options.open_set(chosen, settings.seed)
    if options.fingerprint(found) != kept.get("samples"):
        raise CheckpointError(f"the checkpoint {path} was trained on other samples; accepted: the same set")
    experiment = Experiment(settings, found.to(pick_device(device)))
    experiment.trainer().restore(checkpoint, path)
    return experiment


def _settings_of(checkpoint: dict[str, Any], path: Path) -> Settings:
    try:
        return Settings.from_plain(checkpoint["settings"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} is not one of `linattn train ae`: {error}") from error


def _resumed(
    checkpoint: dict[str, Any], given: dict[str, Any], args: argparse.Namespace, path: Path
) -> tuple[Settings, dict[str, Any]]:
    """Return settings and set of the checkpoint, with changeable ones replaced by those given."""
    settings, kept = _settings_of(checkpoint, path), checkpoint["settings"]
    labels = {"labels": args.labels} if hasattr(args, "labels") else {}
    asked = {**given, **labels, **{name: getattr(args, name) for name in options.SET_DEFAULTS if hasattr(args, name)}}
    had = {**asdict(settings), **kept, "hidden": settings.hidden, "labels": settings.probe.labels}
    resume.check_unchanged(path, asked, had, CHANGEABLE)
    return replace(settings, **given), options.set_options(args, kept)


def _finish(experiment: Experiment, trainer: Trainer, out: Path, command: str, *, figures: bool) -> None:
    settings, last = experiment.settings, trainer.history[-1]
    results = {
        "settings": trainer.settings,
        "parameters": parameter_count(experiment.models) // settings.repeats,
        "epochs": experiment.epoch(last.step),
        "stopped_early": trainer.stopped_early,
        "seconds": round(trainer.seconds, 1),
        "validation_loss": last.validation_loss,
        "measures": last.measures,
    }
    with resume.writing_results(out, command), atomic_file(out / "results.json") as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
    drawings = {}
    if figures:
        from linattn.autoencoders.experiments import run_figures

        drawings = run_figures.draw_all(experiment, trainer.history, out)
    print(f"{out / 'results.json'}" + "".join(f", {name}.png" for name in drawings))
    if trainer.tracker is not None:
        for name, drawing in drawings.items():
            trainer.tracker.figure(last.step, name, drawing)
        means = {f"result/{name}": sum(values) / len(values) for name, values in last.measures.items()}
        trainer.tracker.hyperparameters(asdict(settings), means)
        trainer.tracker.close()


def _print_heading(experiment: Experiment) -> None:
    settings, data = experiment.settings, experiment.data
    parameters = parameter_count(experiment.models) // settings.repeats
    print(
        f"{data.name}: {len(data.train.x)} samples of size {data.input_size} to train on, {len(data.valid.x)} to "
        f"validate, {len(data.test.x)} to test\n"
        f"{settings.objective}, sizes {list(settings.hidden)}, {parameters} parameters, "
        f"{settings.repeats} repeat{'s'[: settings.repeats != 1]}, on {experiment.device}",
        flush=True,
    )


def _print_record(record: Record, experiment: Experiment) -> None:
    mean = {name: sum(values) / len(values) for name, values in record.measures.items()}
    train = f"training {mean['train']:9.4f}  " if "train" in mean else " " * 20
    probe = f"  probe {mean['accuracy']:5.2f} %" if "accuracy" in mean else ""
    print(
        f"epoch {experiment.epoch(record.step):6.1f}  {record.seconds:7.1f} s  {train}"
        f"validation {mean['validation']:9.4f}  clean {mean['reconstruction']:9.4f}{probe}",
        flush=True,
    )
