"""Studies made of many training runs: each run has a folder, and what is finished is not run again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linattn.errors import DataError

RESULTS_NAME = "results.json"


def sweep(
    runs: Mapping[str, Mapping[str, Any]], folder: Path, work: Callable[[str, Path], bool]
) -> dict[str, dict[str, Any]]:
    """Do the runs that are missing and return the results of all.

    Args:
        runs: by name, the settings that its results must show.
        folder: a run leaves `results.json`, with its "settings", in a folder here that has its name.
        work: does one run, given its name and its folder; False when it was interrupted and can go on later.

    Raises:
        DataError: a folder holds results of other settings.
        KeyboardInterrupt: a run was interrupted.
    """
    found = {}
    for index, (name, settings) in enumerate(runs.items(), 1):
        path = folder / name / RESULTS_NAME
        if not path.is_file():
            print(f"run {index} of {len(runs)}: {name}", file=sys.stderr, flush=True)
            if not work(name, folder / name):
                raise KeyboardInterrupt
        results = json.loads(path.read_text())
        other = {key: results["settings"].get(key) for key, value in settings.items()}
        if other != dict(settings):
            raise DataError(f"{path} was made with {other}; accepted: {dict(settings)}, or another --out")
        found[name] = results
    return found
