"""Stages of a long measurement: none takes the others down, and what was found is on disk at once."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from linattn.bench.gpu.stages import DONE, Record, Stage, run_stages
from linattn.errors import DataError

ENDS = "pass"
FAILS = "raise SystemExit(3)"
HANGS = "import time; time.sleep(60)"
CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def _run(tmp_path: Path, programs: dict[str, str], limit_s: float = 30.0, total_s: float = 60.0):
    record = Record(tmp_path / "record.json")
    said: list[str] = []
    stages = [Stage(name, f"runs {name}", limit_s) for name in programs]
    undone = run_stages(
        stages, lambda stage: [sys.executable, "-c", programs[stage.name]], record, total_s=total_s, say=said.append
    )
    return undone, {name: found["state"] for name, found in record.section("stages").items()}, said


def test_a_failing_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    undone, states, said = _run(tmp_path, {"a": ENDS, "b": FAILS, "c": CRASHES, "d": ENDS})
    assert undone == ["b", "c"]
    assert states == {"a": DONE, "b": "failed with status 3", "c": "failed with status -11", "d": DONE}
    assert any("b: failed with status 3" in line for line in said)


def test_a_stage_that_hangs_is_cut_off_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    grandchild = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(child)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    started = time.monotonic()
    undone, states, _ = _run(tmp_path, {"a": parent, "b": ENDS}, limit_s=1.0)
    assert undone[0] == "a"
    assert states["a"] == "cut off after 1 s"
    time.sleep(max(0.0, 3.5 - (time.monotonic() - started)))
    assert not child.exists()


def test_when_the_whole_time_is_spent_the_rest_is_not_started(tmp_path: Path) -> None:
    undone, states, _ = _run(tmp_path, {"a": HANGS, "b": ENDS}, limit_s=40.0, total_s=6.0)
    assert undone == ["a", "b"]
    assert states["a"] == "cut off after 6 s"
    assert states["b"].startswith("not started")


def test_what_a_stage_found_before_it_died_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    writes = (
        f"from pathlib import Path; from linattn.bench.gpu.stages import Record; "
        f"Record(Path({str(path)!r})).put('rows', 'first', 1); raise SystemExit(1)"
    )
    undone, _, _ = _run(tmp_path, {"a": writes})
    assert undone == ["a"]
    assert Record(path).section("rows") == {"first": 1}


def test_a_value_is_replaced_by_its_key_and_others_stay(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "record.json")
    for key, value in (("a", 1), ("b", 2), ("a", 3)):
        record.put("rows", key, value)
    assert json.loads(record.path.read_text()) == {"rows": {"a": 3, "b": 2}}
    record.path.write_text("{")
    with pytest.raises(DataError, match=r"record\.json"):
        record.put("rows", "c", 4)
    assert record.path.read_text() == "{"


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Record(record.path).put("rows", str(i), i), range(60)))
    assert record.section("rows") == {str(i): i for i in range(60)}
