"""Docstrings are in the imperative, rooms have a README, and public functions document every argument."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import linattn
from tests.support import sources
from tests.support.sources import CPP, PACKAGE, ROOT

INSIDE_A_ROOM = {"gpu", "native", "direct", "attention", "common", "graphs", "networks"}
"""Folders of one room by language: the README of the room above speaks of them."""


def documented(function: object) -> set[str]:
    """Names that the section `Args:` of a docstring explains; one line may explain several."""
    docstring = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:(?: .*)?\n)*)", docstring + "\n", re.MULTILINE)
    heads = re.findall(r"^ {4}([\w, *`()-]+):", section[1] if section else "", re.MULTILINE)
    return {name.strip("*` ") for head in heads for name in re.split(r",| and ", re.sub(r"\(.*?\)", "", head))}


def undocumented(function: object) -> list[str]:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    return [name for name in parameters if name != "self" and name not in documented(function)]


def test_docstrings_are_in_the_imperative() -> None:
    found = [
        f"{sources.name(path)}:{line}: {docstring.splitlines()[0]}"
        for path in sources.files(".py")
        for line, docstring in sources.docstrings(path.read_text(encoding="utf-8"))
        if docstring.startswith("What ")
    ]
    assert not found, "\n".join(found)


def _is_spoken_of(room: Path) -> bool:
    return any((folder / "README.md").is_file() for folder in room.parents if ROOT in folder.parents)


def test_every_room_has_a_readme() -> None:
    rooms = {path.parent for path in sources.files(".py", *CPP, folders=(*PACKAGE, "tests"))}
    rooms = {room for room in rooms if "tests" not in room.relative_to(ROOT).parts or room.name == "tests"}
    # A README beside an operation is its derivation, which this one has none of: kernels/README.md speaks of it.
    rooms.discard(ROOT / "kernels" / "custom_similarity")
    found = {
        sources.name(room)
        for room in rooms
        if not (room / "README.md").is_file()
        and not ((room.name in INSIDE_A_ROOM or room.parent.name == "native") and _is_spoken_of(room))
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("name", [name for name in linattn.__all__ if inspect.isroutine(getattr(linattn, name))])
def test_public_functions_document_every_argument(name: str) -> None:
    assert undocumented(getattr(linattn, name)) == []


def test_an_argument_without_a_word_is_found() -> None:
    def some(q: int, k: int, *, scale: float, **options: int) -> None:
        """Do it.

        Args:
            q, k: the inputs.
            **options: what else there is.

        Returns:
            scale: nothing.
        """

    assert undocumented(some) == ["scale"]
    assert undocumented(lambda x: x) == ["x"]
