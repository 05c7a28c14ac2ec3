"""Options that the commands on autoencoders share: the choice of a set, and the settings that suit each set."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linattn._util import figures
from linattn.autoencoders.analysis.probe import ProbeConfig
from linattn.autoencoders.data.sets import NAMES, SampleSet, load_set
from linattn.autoencoders.experiments.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

_FEW_LABELS = ProbeConfig(labels=200, epochs=1000)
PRESETS = {
    "digits": Settings(batch=50, epochs=60, validate_every=6, probe=_FEW_LABELS),
    "mnist": Settings(batch=200, epochs=10, probe=_FEW_LABELS),
    "synthetic": Settings(batch=100, epochs=10, probe=ProbeConfig(epochs=50)),
    "file": Settings(batch=100, epochs=10, probe=ProbeConfig(epochs=50)),
}
SET_DEFAULTS = {"set": "digits", "data": None, "download": False, "variance_scale": 10.0}


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --set, --data, --download, --variance-scale. Absent ones stay absent: a resumed run has them already."""

    def add(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **more)

    add("--set", f"what to learn from: {', '.join(NAMES)} (digits)", metavar="NAME")
    add("--data", "folder of MNIST's files (default: the cache), or the .npz file of --set file", metavar="PATH")
    add("--download", "fetch MNIST (11.6 MB) into that folder if it is not there", action="store_true")
    add("--variance-scale", "of the synthetic set (10)", type=float)


def set_options(args: argparse.Namespace, kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Collect the options of `add_set_arguments`: as given, else as kept from an earlier run, else the defaults."""
    return {name: getattr(args, name, (kept or {}).get(name, value)) for name, value in SET_DEFAULTS.items()}


def open_set(options: Mapping[str, Any], seed: int) -> SampleSet:
    """Load what the options of `set_options` name; errors as of `load_set`."""
    data = None if options["data"] is None else Path(options["data"])
    return load_set(
        options["set"],
        data=data,
        seed=seed,
        download=options["download"],
        variance_scale=options["variance_scale"],
    )


def fingerprint(data: SampleSet) -> str:
    """Hash the samples of all splits: equal for equal samples, on any machine."""
    digest = hashlib.sha256()
    for split in data[1:4]:
        for tensor in split:
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_matplotlib() -> None:
    """Raise MissingExtraError now rather than after the computation."""
    figures.require_matplotlib("train", "drawing figures (leave it out with --no-figure)")
