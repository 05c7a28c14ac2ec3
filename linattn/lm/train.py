"""`linattn train lm`: train a character language model on a text file, with any attention kernel.

What a run leaves in its folder: `checkpoint.pt`, `history.jsonl` (one line a validation), `curve.png`, `sample.txt` and
`results.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn._util import figures
from linattn._util.environment import describe, pick_device
from linattn._util.files import atomic_file
from linattn.errors import ArgumentError, CheckpointError, DataError, refusal
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.lm.text import Characters, Trigram, consecutive_windows, random_windows
from linattn.training import resume
from linattn.training.checkpoint import CHECKPOINT_NAME
from linattn.training.trainer import Record, Trainer, TrainingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from linattn.modules import LayerKind

VALIDATION_BATCH = 32


@dataclass(frozen=True)
class LMSettings:
    """All that decides the outcome of a run. The names are those of the options."""

    text: str = ""
    kernel: str = "quadratic"
    form: str | None = None
    layer: LayerKind = "prenorm"
    layers: int = 4
    dim: int = 128
    heads: int = 2
    kv_heads: int | None = None
    qk_norm: bool = False
    context: int = 256
    dropout: float = 0.0
    batch: int = 8
    steps: int | None = None
    minutes: float | None = None
    lr: float = 4e-3
    weight_decay: float = 0.1
    validate_every: int = 250
    seed: int = 0
    device: str = "auto"
    sample: int = 500

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("sample", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise refusal(
                    ArgumentError,
                    f"{name} is too small",
                    given=f"{name}={getattr(self, name)}",
                    accepted=f"at least {least}",
                )

    def model_config(self, vocabulary: int) -> CausalLMConfig:
        """Return the part that describes the model."""
        return CausalLMConfig(
            vocabulary=vocabulary,
            context=self.context,
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            kernel=tuple(self.kernel.split(",")) if "," in self.kernel else self.kernel,
            form=self.form,
            layer=self.layer,
            qk_norm=self.qk_norm,
            dropout=self.dropout,
        )

    def training_config(self) -> TrainingConfig:
        """Return the part that describes the training."""
        return TrainingConfig(
            steps=self.steps,
            minutes=self.minutes,
            learning_rate=self.lr,
            weight_decay=self.weight_decay,
            validate_every=self.validate_every,
        )


DEFAULT_MINUTES = 10.0
QUICK = LMSettings(layers=1, dim=32, context=32, steps=30, validate_every=15, sample=80)
# What may differ between the sessions of one run: where it stops and what is made of it, not what is trained.
CHANGEABLE = {"text", "steps", "minutes", "validate_every", "device", "sample"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare text, model and training. Absent options stay absent, so that a resumed run finds contradictions."""
    default = LMSettings()

    def add(name: str, kind: type, text: str, **more: Any) -> None:
        shown = getattr(default, name.replace("-", "_"))
        hint = "" if shown in (None, "") else f" (default {shown})"
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text + hint, **more)

    add("text", str, "UTF-8 text file to learn; its last tenth is kept for validation", metavar="FILE")
    add("kernel", str, "softmax, quadratic, taylor, a feature map such as elu+1, or several with commas, by layer")
    add("form", str, "direct, chunked or recurrent; softmax has one form only")
    add("layer", str, "prenorm or course")
    add("layers", int, "number of layers")
    add("dim", int, "width of the model")
    add("heads", int, "attention heads")
    add("kv-heads", int, "key and value heads, fewer than heads for grouped-query attention")
    parser.add_argument(
        "--qk-norm",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="bring queries and keys to root mean square 1 (default off)",
    )
    add("context", int, "characters in a window to learn")
    add("dropout", float, "share of activations dropped in training")
    add("batch", int, "windows in a step")
    add("steps", int, "stop after so many steps in all")
    add(
        "minutes",
        float,
        f"stop after so many minutes of training in all (default {DEFAULT_MINUTES:g} when no steps are given)",
    )
    add("lr", float, "peak learning rate")
    add("weight-decay", float, "decay of weight matrices")
    add("validate-every", int, "steps between validations, each with a checkpoint")
    add("seed", int, "of weights, data order and sample")
    add("device", str, "auto, cpu, cuda, ...")
    add("sample", int, "characters to write into sample.txt at the end; 0 for none")
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/lm-KERNEL)")
    resume.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few seconds, to see that all works")


def run(args: argparse.Namespace) -> int:
    """Train, then write the results; 130 when interrupted."""
    given = resume.given_options(args, LMSettings)
    out = args.out or Path("runs") / f"lm-{given.get('kernel', LMSettings.kernel)}".replace(",", "-")
    path = out / CHECKPOINT_NAME
    checkpoint = resume.checkpoint_to_resume(path, args)
    if checkpoint is not None:
        settings = resumed_settings(checkpoint, given, path)
    else:
        settings = replace(QUICK if args.quick else LMSettings(), **given)
        if settings.steps is None and settings.minutes is None:
            settings = replace(settings, minutes=DEFAULT_MINUTES)
    if not settings.text:
        raise DataError(
            "no text was given; accepted: --text FILE, a plain text file in UTF-8 to learn from (nothing is downloaded)"
        )
    if not args.no_figure:
        figures.require_matplotlib("train", "drawing the curve (leave it out with --no-figure)")

    text = Characters.from_file(settings.text)
    if checkpoint is not None and checkpoint["settings"].get("sha256") != text.sha256:
        raise CheckpointError(
            f"the checkpoint {path} was trained on another text than {settings.text}; accepted: the same text"
        )
    model, trainer = prepare(settings, text, out)
    trigram = Trigram(text.train, len(text.alphabet)).loss(text.validation)
    trainer.on_record = lambda record: _print_record(record, trigram)
    resume.begin(trainer, checkpoint, path, args)
    _print_heading(settings, text, model, trigram)

    command = f"linattn train lm --out {out}"
    if not resume.train(trainer, f"{command} --resume"):
        return 130
    with resume.writing_results(out, command):
        write_results(settings, text, model, trainer, trigram, out, figure=not args.no_figure)
    return 0


def resumed_settings(checkpoint: dict[str, Any], given: dict[str, Any], path: Path) -> LMSettings:
    """Return the settings of the checkpoint with changeable ones replaced by those given.

    Raises:
        CheckpointError: the checkpoint is not of a language model, or options contradict it.
    """
    kept = {
        name: value
        for name, value in checkpoint.get("settings", {}).items()
        if name not in ("sha256", "alphabet", "environment")
    }
    try:
        settings = LMSettings(**kept)
    except TypeError as error:
        raise CheckpointError(f"the checkpoint {path} is not one of `linattn train lm`: {error}") from error
    resume.check_unchanged(path, given, asdict(settings), CHANGEABLE)
    if {"steps", "minutes"} & given.keys():  # a limit given replaces the old ones, whichever they were
        settings = replace(settings, steps=None, minutes=None)
    return replace(settings, **given)


def prepare(settings: LMSettings, text: Characters, out: Path | None = None) -> tuple[CausalLM, Trainer]:
    """Make model and trainer for these settings, seeded and on their device, at step 0.

    Raises:
        ArgumentError: settings of which no model can be made, or a context longer than a part of the text.
        DeviceError: the device is not there.
    """
    longest = min(len(text.train), len(text.validation)) - 1
    if settings.context > longest:
        raise refusal(
            ArgumentError,
            f"a text with {len(text.train)} characters to train on and {len(text.validation)} to validate is too short",
            given=f"context={settings.context}",
            accepted=f"at most {longest}, or a longer text",
        )
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    model = CausalLM(settings.model_config(len(text.alphabet))).to(device)
    validation = consecutive_windows(text.validation, settings.context).to(device)

    def loss(step: int) -> Tensor:
        windows = random_windows(text.train, settings.batch, settings.context + 1, seed=settings.seed, step=step)
        return model.loss(windows.to(device))

    def validate() -> float:
        total = 0.0
        for start in range(0, len(validation), VALIDATION_BATCH):
            windows = validation[start : start + VALIDATION_BATCH]
            total += model.loss(windows).item() * len(windows)
        return total / len(validation)

    # Taken before training: the working tree may move on meanwhile.
    kept = {
        **asdict(settings),
        "sha256": text.sha256,
        "alphabet": text.alphabet,
        "environment": asdict(describe(device)),
    }
    return model, Trainer(model, loss, validate, settings.training_config(), folder=out, settings=kept)


def write_results(
    settings: LMSettings,
    text: Characters,
    model: CausalLM,
    trainer: Trainer,
    trigram: float,
    out: Path,
    *,
    figure: bool,
) -> None:
    """Write sample, curve and results.json, log to the tracker, and print the outcome."""
    last = trainer.history[-1]
    best = min(trainer.history, key=lambda record: record.validation_loss)
    results = {
        "settings": {**asdict(settings), "text": Path(settings.text).name},
        "text": {
            "sha256": text.sha256,
            "train": len(text.train),
            "validation": len(text.validation),
            "alphabet": len(text.alphabet),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": last.step,
        "seconds": round(trainer.seconds, 1),
        "unit": "nats per character",
        "train_loss": last.train_loss,
        "validation_loss": last.validation_loss,
        "best_validation_loss": best.validation_loss,
        "trigram_validation_loss": trigram,
        "beats_trigram": last.validation_loss < trigram,
        "environment": trainer.settings["environment"],
    }
    with atomic_file(out / "results.json") as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
    if settings.sample:
        sample = write_sample(settings, text, model)
        with atomic_file(out / "sample.txt") as file:
            file.write(sample.encode() + b"\n")
    if figure:
        curve = draw_curve(trainer.history, trigram, settings.kernel)
        figures.save(curve, out / "curve.png")
        if trainer.tracker is not None:
            trainer.tracker.figure(last.step, "loss", curve)
    if trainer.tracker is not None:
        trainer.tracker.hyperparameters(
            asdict(settings),
            {"result/validation": last.validation_loss, "result/trigram": trigram, "result/seconds": trainer.seconds},
        )
        trainer.tracker.close()
    verdict = "beats" if last.validation_loss < trigram else "does NOT beat"
    print(
        f"validation {_loss(last.validation_loss)} {verdict} the trigram's {_loss(trigram)}, "
        f"after {last.step} steps in {trainer.seconds / 60:.1f} minutes; results in {out}"
    )


def write_sample(settings: LMSettings, text: Characters, model: CausalLM) -> str:
    """Continue the first whole line of the validation text by `settings.sample` characters of the model."""
    opening = text.decode(text.validation[:1000])
    whole = [line for line in opening.splitlines(keepends=True)[1:] if line.strip() and line.endswith("\n")]
    prompt = whole[0] if whole else opening[0]
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    tokens = model.generate(
        text.encode(prompt)[None].to(device),
        settings.sample,
        temperature=0.8,
        look_back=settings.context,
        generator=generator,
    )
    return text.decode(tokens[0].cpu())


def draw_curve(history: list[Record], trigram: float, kernel: str) -> Figure:
    """Draw losses against steps and against minutes, with the trigram's as a line."""
    trained = [record for record in history if record.train_loss is not None]
    figure = figures.new_figure(10, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label, name, unit in (
        (left, "optimiser steps", "step", 1),
        (right, "wall time of training (minutes)", "seconds", 60),
    ):
        for lines, loss, style in (
            (
                trained,
                "train_loss",
                {"color": figures.BLUE, "alpha": 0.5, "label": "training, mean since the last point"},
            ),
            (history, "validation_loss", {"color": figures.VERMILION, "marker": ".", "label": "validation"}),
        ):
            axes.plot([getattr(r, name) / unit for r in lines], [getattr(r, loss) for r in lines], **style)
        axes.axhline(trigram, color=figures.BLACK, linestyle="--", label=f"trigram, validation: {trigram:.3f}")
        axes.set_xlabel(label)
        figures.add_grid(axes)
    # The untrained model, at step 0, lies far above everything of interest and may leave the picture.
    shown = [trigram, *(r.validation_loss for r in history if r.step or not trained)]
    shown += [r.train_loss for r in trained if r.train_loss is not None]
    margin = 0.05 * (max(shown) - min(shown)) + 0.01
    left.set_ylim(min(shown) - margin, max(shown) + margin)
    left.set_ylabel("loss (nats per character)")
    right.legend()
    figure.suptitle(
        f"Character language model, {kernel} attention: validation {history[-1].validation_loss:.3f} nats per character"
    )
    return figure


def _print_heading(settings: LMSettings, text: Characters, model: CausalLM, trigram: float) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = model.embedding.weight.device
    print(
        f"{settings.text}: {len(text.train)} characters to train on, {len(text.validation)} to validate, "
        f"{len(text.alphabet)} different ones\n"
        f"{settings.kernel} attention, {parameters} parameters, on {device}; trigram of this text: {_loss(trigram)}",
        flush=True,
    )


def _print_record(record: Record, trigram: float) -> None:
    train = "" if record.train_loss is None else f"training {record.train_loss:.4f}  "
    losses = f"{train}validation {record.validation_loss:.4f}  trigram {trigram:.4f}"
    print(f"step {record.step:6d}  {record.seconds / 60:6.1f} min  {losses}", flush=True)


def _loss(nats: float) -> str:
    return f"{nats:.4f} nats ({nats / math.log(2):.4f} bits) per character"
