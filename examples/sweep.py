"""Studies made of many training runs: each run has a folder, and what is finished is not run again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linattn.sweeps import Job, finished

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
    jobs = {name: Job(folder / name / RESULTS_NAME, settings) for name, settings in runs.items()}
    found = finished(jobs)
    for index, (name, job) in enumerate(jobs.items(), 1):
        if name not in found:
            print(f"run {index} of {len(runs)}: {name}", file=sys.stderr, flush=True)
            if not work(name, folder / name):
                raise KeyboardInterrupt
            found |= finished({name: job})
    return {name: found[name] for name in runs}
