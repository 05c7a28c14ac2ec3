"""`linattn sweep ae`: many autoencoders on one set, over latent sizes, linear or not, and the three objectives.

What it leaves in its folder: `jobs/` (one file a finished job; a sweep that was stopped goes on from there),
`results.json` (every curve of every repeat), `table.csv`, and figures.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linattn._util.argtypes import whole
from linattn._util.environment import describe
from linattn._util.files import write_json, write_text
from linattn._util.progress import progress
from linattn._util.tables import text_table
from linattn.autoencoders.analysis.principal import principal_components
from linattn.autoencoders.data.sets import SampleSet, check_labels
from linattn.autoencoders.experiments import options
from linattn.autoencoders.experiments.experiment import Experiment, build
from linattn.autoencoders.experiments.settings import OBJECTIVES, Settings
from linattn.autoencoders.models.repeats import batching_pays
from linattn.errors import ArgumentError
from linattn.training.jobs import JobFile, read_finished
from linattn.training.workers import side_by_side

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

MODELS = ("linear", "relu")
SIZES = (5, 10, 100, 1000)
# Width of the layer before the bottleneck of the nonlinear models.
WIDTH = 256
ELSEWHERE = "--overwrite to begin anew, or another --out"
COLUMNS = (
    "model",
    "objective",
    "k",
    "repeats",
    "training",
    "validation",
    "reconstruction",
    "PCA",
    "probe %",
    "lowest",
    "highest",
)


@dataclass(frozen=True)
class SweepJob:
    """The work of one process in one go: some repeats of one combination, trained together.

    Attributes:
        model: "linear" (F -> k -> F) or "relu" (F -> 256 -> k -> 256 -> F).
        objective: one of `OBJECTIVES`.
        k: size of the code.
        members: which repeats.
        settings: of the experiment they belong to.
    """

    model: str
    objective: str
    k: int
    members: tuple[int, ...]
    settings: Settings

    @property
    def name(self) -> str:
        """Name of the job and of the file with its results."""
        return f"{self.model}-{self.objective}-{self.k}-" + "-".join(map(str, self.members))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the set, the combinations to train, --workers and --out."""
    options.add_set_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--k", type=whole, nargs="+", default=SIZES, help="sizes of the code (5 10 100 1000)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="(all)")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, help="(all)")
    parser.add_argument("--repeats", type=whole, help="of each (3; nonlinear on mnist 5)")
    parser.add_argument("--epochs", type=whole, help="of training (10; digits 60)")
    parser.add_argument(
        "--workers", type=whole, default=os.cpu_count() or 1, help="processes side by side (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder (runs/sweep-ae-SET); a sweep that was stopped there goes on")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds finished jobs")
    parser.add_argument("--no-figure", action="store_true", help="do not draw, which needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Do the jobs that are not done yet, then print, write and draw what is there; 130 when interrupted."""
    if not args.no_figure:
        options.require_matplotlib()
    chosen = options.set_options(args)
    out: Path = args.out or Path("runs") / f"sweep-ae-{chosen['set']}"
    data = options.open_set(chosen, args.seed)
    check_labels(data)
    jobs = plan(args, data)
    if args.overwrite:
        for path in (out / "jobs").glob("*.json"):
            path.unlink()
    _claim(out, options.fingerprint(data))
    done = read_finished({job.name: JobFile(_path(out, job), asdict(job.settings)) for job in jobs}, ELSEWHERE)
    left = [job for job in jobs if job.name not in done]
    print(f"{len(jobs)} jobs, {len(done)} of them done before; {args.workers} processes", flush=True)
    # Ctrl-C gives up the jobs under way; the results of the others are written all the same.
    with suppress(KeyboardInterrupt):
        for job, found in _finish(left, data, args.workers, out):
            if found is not None:
                done[job.name] = found
    if done:
        results = assemble(args, data, jobs, done, _sessions(out))
        write(results, out)
        print(table(results))
        if not args.no_figure:
            from linattn.autoencoders.experiments.sweep_figures import draw_all

            draw_all(results, out)
        print(f"\n{results['seconds']:.0f} s of wall time on {args.workers} processes; {out}")
    if len(done) < len(jobs):
        print(
            f"stopped with {len(done)} of {len(jobs)} jobs done, and the results hold these; the same command goes on",
            file=sys.stderr,
        )
        return 130
    return 0


def plan(args: argparse.Namespace, data: SampleSet) -> list[SweepJob]:
    """List all jobs, the shortest first: repeats together where one batched model is faster, else one a job."""
    jobs = []
    for model in args.models:
        for objective in args.objectives:
            for k in args.k:
                repeats = args.repeats or (5 if (data.name, model) == ("mnist", "relu") else 3)
                settings = replace(
                    options.PRESETS[data.name],
                    objective=objective,
                    hidden=(k,) if model == "linear" else (WIDTH, k),
                    activation="identity" if model == "linear" else "relu",
                    repeats=repeats,
                    seed=args.seed,
                )
                if args.epochs is not None:
                    every = max(1, args.epochs // 10)
                    settings = replace(settings, epochs=args.epochs, validate_every=every)
                trial = [build(settings, data, seed) for seed in range(min(repeats, 2))]
                together = [tuple(range(repeats))] if batching_pays(trial) else [(r,) for r in range(repeats)]
                jobs += [SweepJob(model, objective, k, members, settings) for members in together]
    return sorted(jobs, key=lambda job: (job.k, OBJECTIVES.index(job.objective)))


def work(job: SweepJob, data: SampleSet) -> dict[str, Any] | None:
    """Train and measure; None when interrupted."""
    started = time.monotonic()
    trainer = Experiment(job.settings, data, job.members).trainer(show_progress=False)
    if not trainer.run():
        return None
    batches = -(-len(data.train.x) // job.settings.batch)
    names = trainer.history[-1].measures
    return {
        "settings": asdict(job.settings),
        "members": list(job.members),
        "epochs": [record.step / batches for record in trainer.history],
        # name -> repeat -> validation; the first one has no training loss yet.
        "curves": {
            name: [
                [r.measures[name][i] if name in r.measures else None for r in trainer.history]
                for i in range(len(job.members))
            ]
            for name in names
        },
        "seconds": time.monotonic() - started,
    }


def _finish(
    jobs: Sequence[SweepJob], data: SampleSet, workers: int, out: Path
) -> Iterator[tuple[SweepJob, dict[str, Any] | None]]:
    """Do the jobs side by side and write each result as it comes; on Ctrl-C what runs is given up."""
    started = time.monotonic()
    try:
        with progress(len(jobs), "job", smoothing=0.1) as bar:
            for job, found in side_by_side(jobs, work, data, workers):
                if found is not None:
                    write_json(_path(out, job), found)
                    bar.update()
                yield job, found
    finally:
        if jobs:
            session = {"workers": workers, "seconds": time.monotonic() - started}
            write_json(_sessions_path(out), [*_sessions(out), session])


def assemble(
    args: argparse.Namespace,
    data: SampleSet,
    jobs: Sequence[SweepJob],
    done: dict[str, Any],
    sessions: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Collect one entry a combination that was begun, with the curves of its finished repeats in order."""
    bounds = {k: _bound(data, k) for k in args.k}
    cells: dict[tuple[str, str, int], dict[str, Any]] = {}
    for job in sorted((job for job in jobs if job.name in done), key=lambda job: job.members):
        found = done[job.name]
        cell = cells.setdefault(
            (job.model, job.objective, job.k),
            {
                "model": job.model,
                "objective": job.objective,
                "k": job.k,
                "hidden": list(job.settings.hidden),
                "together": len(job.members) == job.settings.repeats,
                "pca": bounds[job.k],
                "epochs": found["epochs"],
                "curves": {name: [] for name in found["curves"]},
                "seconds": 0.0,
            },
        )
        for name, curves in found["curves"].items():
            cell["curves"][name] += curves
        cell["seconds"] += found["seconds"]
    order = [(model, objective, k) for model in args.models for objective in args.objectives for k in args.k]
    return {
        "set": data.name,
        "variance_scale": options.set_options(args)["variance_scale"] if data.name == "synthetic" else None,
        "input_size": data.input_size,
        "samples": {name: len(split.x) for name, split in zip(("train", "valid", "test"), data[1:4], strict=True)},
        "settings": {
            **asdict(jobs[0].settings),
            "hidden": None,
            "objective": None,
            "activation": None,
            "repeats": None,
        },
        "seconds": sum(session["seconds"] for session in sessions),
        "sessions": list(sessions),
        "environment": asdict(describe(torch.device("cpu"))),
        "jobs": {"planned": len(jobs), "done": len(done)},
        "cells": [cells[key] for key in order if key in cells],
    }


def rows(results: dict[str, Any]) -> list[tuple[object, ...]]:
    """Compute the entries of the table: means over the repeats at the end of training."""
    found: list[tuple[object, ...]] = []
    for cell in results["cells"]:
        last = {name: [curve[-1] for curve in curves] for name, curves in cell["curves"].items()}
        mean = {name: sum(values) / len(values) for name, values in last.items()}
        losses = (mean["train"], mean["validation"], mean["reconstruction"], cell["pca"])
        accuracy = (mean["accuracy"], min(last["accuracy"]), max(last["accuracy"]))
        found.append((cell["model"], cell["objective"], cell["k"], len(last["train"]), *losses, *accuracy))
    return found


def table(results: dict[str, Any]) -> str:
    """Lay out the entries for a terminal."""
    return text_table(COLUMNS, rows(results))


def write(results: dict[str, Any], out: Path) -> None:
    """Write `results.json` and `table.csv`.

    Raises:
        DataError: the folder cannot be written.
    """
    write_json(out / "results.json", results)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [COLUMNS, *([f"{c:.5g}" if isinstance(c, float) else c for c in row] for row in rows(results))]
    )
    write_text(out / "table.csv", text.getvalue())


def _bound(data: SampleSet, k: int) -> float:
    """Return the validation error of the k principal components of the training split, its best linear code."""
    if k >= data.input_size:
        return 0.0
    components = principal_components(data.train.x, k)
    x = data.valid.x.double() - components.mean
    return (x - x @ components.directions @ components.directions.mT).square().sum(1).mean().item()


def _claim(out: Path, samples: str) -> None:
    """Keep results on different samples apart."""
    path = out / "jobs" / "set.json"
    if not path.is_file():
        write_json(path, {"samples": samples})
    elif json.loads(path.read_text())["samples"] != samples:
        raise ArgumentError(
            f"the jobs in {out} were done on other samples; accepted: the same set and seed, or {ELSEWHERE}"
        )


def _path(out: Path, job: SweepJob) -> Path:
    return out / "jobs" / f"{job.name}.json"


def _sessions_path(out: Path) -> Path:
    return out / "jobs" / "sessions.json"


def _sessions(out: Path) -> list[dict[str, Any]]:
    path = _sessions_path(out)
    sessions: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return sessions
