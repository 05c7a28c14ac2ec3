"""Sweeps: jobs that leave their results in a file each, so that what is finished is not done again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from linattn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class JobFile(NamedTuple):
    """Where a job leaves its results, a JSON object, and what these must show under "settings"."""

    path: Path
    settings: Mapping[str, Any]


def read_finished(jobs: Mapping[str, JobFile], elsewhere: str = "another --out") -> dict[str, dict[str, Any]]:
    """Read the results of those jobs that have left any, by name.

    Args:
        jobs: by name.
        elsewhere: what else is accepted where results of other settings are in the way.

    Raises:
        DataError: a file that holds no results, or results of other settings.
    """
    found = {}
    for name, job in jobs.items():
        if not job.path.is_file():
            continue
        try:
            results = json.loads(job.path.read_text())
            had = results["settings"]
            # As they would be read again: tuples are lists there.
            expected = json.loads(json.dumps(dict(job.settings)))
            other = [key for key in expected if key not in had or had[key] != expected[key]]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{job.path} cannot be read: {error}; accepted: results of a job, or {elsewhere}"
            ) from error
        if other:
            raise DataError(
                f"{job.path} was made with { ({key: had.get(key) for key in other}) }; "
                f"accepted: { ({key: expected[key] for key in other}) }, or {elsewhere}"
            )
        found[name] = results
    return found
