"""Studies made of many training runs: each run has a folder, and what is finished is not run again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from linattn.training.jobs import JobFile, read_finished
from linattn.training.workers import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

RESULTS_NAME = "results.json"


def sweep(
    runs: Mapping[str, Mapping[str, Any]], folder: Path, work: Callable[[str, Path], bool], workers: int = 1
) -> dict[str, dict[str, Any]]:
    """Do the runs that are missing and return the results of all.

    Args:
        runs: by name, the settings that its results must show.
        folder: a run leaves `results.json`, with its "settings", in a folder here that has its name.
        work: does one run, given its name and its folder; False when it was interrupted and can go on later.
        workers: runs side by side, each in a process of its own, to which `work` can be sent.

    Raises:
        DataError: a folder holds results of other settings.
        KeyboardInterrupt: a run was interrupted.
    """
    jobs = {name: JobFile(folder / name / RESULTS_NAME, settings) for name, settings in runs.items()}
    found = read_finished(jobs)
    for name, ended in side_by_side([name for name in runs if name not in found], _one, (work, folder), workers):
        if not ended:
            raise KeyboardInterrupt
        found |= read_finished({name: jobs[name]})
        print(f"{len(found)} of {len(runs)} runs: {name}", file=sys.stderr, flush=True)
    return {name: found[name] for name in runs}


def _one(name: str, how: tuple[Callable[[str, Path], bool], Path]) -> bool | None:
    """Do one run; None when it was interrupted."""
    work, folder = how
    return work(name, folder / name) or None
