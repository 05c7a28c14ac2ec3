"""A long measurement in stages: each a process of its own with a time limit, so that none can take the others down, and
one file of what is known so far, written after every finding.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linattn._util.files import write_json
from linattn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DONE = "done"
SHORTEST_S = 5.0
"""With less time than this left no stage is started."""


class Record:
    """A JSON file of sections `{section: {key: value}}`. Every `put` reads, replaces one value and renames, so that a
    cut-off loses nothing; threads of one process may write at any time, processes in turn.
    """

    _writing = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, dict[str, Any]]:
        """Return all sections; none if there is no file yet.

        Raises:
            DataError: the file cannot be read.
        """
        if not self.path.exists():
            return {}
        try:
            found: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise DataError(f"cannot read {self.path}: {problem}") from problem
        return found

    def section(self, name: str) -> dict[str, Any]:
        """Return one section, empty if there is none."""
        return self.load().get(name, {})

    def put(self, section: str, key: str, value: Any) -> None:
        """Add or replace one value.

        Raises:
            DataError: the file cannot be written; it stays as it was.
        """
        with self._writing:
            found = self.load()
            found.setdefault(section, {})[key] = value
            write_json(self.path, found)


@dataclass(frozen=True)
class Stage:
    """One stage: its name, what it does in words, and the seconds it may take."""

    name: str
    summary: str
    limit_s: float


def run_stages(
    stages: Sequence[Stage],
    command: Callable[[Stage], Sequence[str]],
    record: Record,
    *,
    total_s: float,
    say: Callable[[str], object] = print,
) -> list[str]:
    """Run `command(stage)` for each stage in turn until `total_s` seconds are spent.

    What became of it is in the record's section "stages" before the next one starts: its state ("done", "failed with
    status 3", "cut off after 60 s", "not started: ...") and how long it took.

    Returns:
        the names of stages that are not done.
    """
    end, undone = time.monotonic() + total_s, []
    for number, stage in enumerate(stages, 1):
        started = time.monotonic()
        limit = min(stage.limit_s, end - started)
        say(f"\n[{number}/{len(stages)}] {stage.name}: {stage.summary} (at most {max(limit, 0):.0f} s)")
        if limit < min(SHORTEST_S, stage.limit_s):
            state = f"not started: the {total_s:.0f} s of the whole run are spent"
        else:
            record.put("stages", stage.name, {"state": "running"})
            state = _run(command(stage), limit)
        seconds = time.monotonic() - started
        record.put("stages", stage.name, {"state": state, "seconds": round(seconds, 1)})
        say(f"[{number}/{len(stages)}] {stage.name}: {state}, {seconds:.0f} s")
        if state != DONE:
            undone.append(stage.name)
    return undone


def _run(command: Sequence[str], limit_s: float) -> str:
    """Run a command; return the state of a command that has ended or was made to; its own children end with it."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        return f"cut off after {limit_s:.0f} s"
    except BaseException:
        _end(process)
        raise
    return DONE if status == 0 else f"failed with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
