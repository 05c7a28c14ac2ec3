from __future__ import annotations

import os
from pathlib import Path

import pytest

from linattn._util.files import atomic_file, write_json, write_text
from linattn.errors import DataError


def test_atomic_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()

    def break_off() -> None:
        with atomic_file(path) as file:
            file.write(b"two")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    flushed: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(path.exists()))
    with atomic_file(path) as file:
        file.write(b"one")
    assert flushed == [False]


def test_a_json_file_ends_with_a_line_break_and_keeps_its_indent(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"a": [1]})
    write_json(tmp_path / "two.json", {"ä": 1}, indent=2)
    assert (tmp_path / "one.json").read_text() == '{\n "a": [\n  1\n ]\n}\n'
    assert (tmp_path / "two.json").read_text() == '{\n  "\\u00e4": 1\n}\n'


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*file/text: .*; accepted: a folder to write"):
        write_text(tmp_path / "file" / "text", "ä")
    write_text(tmp_path / "text", "ä")
    assert (tmp_path / "text").read_bytes() == "ä".encode()
