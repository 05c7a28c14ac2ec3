from __future__ import annotations

from pathlib import Path

import pytest

from linattn._util.files import write_json
from linattn.errors import DataError
from linattn.training.jobs import JobFile, read_finished


def test_what_is_finished_is_found_with_all_that_it_tells(tmp_path: Path) -> None:
    settings = {"sizes": (1, 2), "seed": 0}
    write_json(tmp_path / "a.json", {"settings": {**settings, "more": 1}, "loss": 0.5})
    jobs = {name: JobFile(tmp_path / f"{name}.json", settings) for name in ("a", "b")}
    assert read_finished(jobs) == {"a": {"settings": {"sizes": [1, 2], "seed": 0, "more": 1}, "loss": 0.5}}


def test_results_of_other_settings_are_refused_and_say_which(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"settings": {"seed": 0, "steps": 5}})
    with pytest.raises(DataError, match=r"with {'seed': 0, 'lr': None}; accepted: {'seed': 1, 'lr': 2}, or another"):
        read_finished({"a": JobFile(tmp_path / "a.json", {"seed": 1, "lr": 2, "steps": 5})})


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": null}', "{}"])
def test_what_holds_no_results_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json cannot be read: .*; accepted: .*, or --overwrite"):
        read_finished({"a": JobFile(tmp_path / "a.json", {"seed": 1})}, "--overwrite")
