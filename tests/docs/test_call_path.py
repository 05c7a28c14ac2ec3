"""docs/call-path.md is true: every file of it exists and defines the function named, and the path is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "call-path.md"
STEP = re.compile(r"^\d+\. \[`(?P<path>[^`]+)`\]\((?P<link>[^)]+)\) `(?P<name>\w+)`: ", re.MULTILINE)
MOST_FILES = {
    "Forward, on a CPU": 14,
    "Forward, on a GPU": 12,
    "Backward, on a CPU": 14,
    "Backward, on a GPU": 12,
}


def sections() -> dict[str, str]:
    _, *parts = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(part.split("\n", 1) for part in parts)


def defines(path: Path, name: str) -> bool:
    """A Python function, or a C++ one: its name, arguments, and a body."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return re.search(rf"^\s*def {name}\(", text, re.MULTILINE) is not None
    return re.search(rf"^[\w<>:&* ]+\b{name}\([^;{{]*\)(?: const)? \{{", text, re.MULTILINE) is not None


@pytest.mark.parametrize("title", MOST_FILES)
def test_the_path_is_short_and_every_step_exists(title: str) -> None:
    section = sections()[title]
    steps = list(STEP.finditer(section))
    numbered = re.findall(r"^\d+\. ", section, re.MULTILINE)
    assert len(steps) == len(numbered) > 0
    assert len({step["path"] for step in steps}) <= MOST_FILES[title]
    for step in steps:
        path = ROOT / step["path"]
        assert (PAGE.parent / step["link"]).resolve() == path
        assert path.is_file(), f"{step['path']} is gone"
        assert defines(path, step["name"]), f"{step['path']} defines no {step['name']}"
