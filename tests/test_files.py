from __future__ import annotations

import os
from pathlib import Path

import pytest

from linattn.files import atomic_file


def test_atomic_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"two")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    flushed: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(path.exists()))
    with atomic_file(path) as file:
        file.write(b"one")
    assert flushed == [False]
