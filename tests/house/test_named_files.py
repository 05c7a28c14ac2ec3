"""Every file that a comment, a docstring or a page names is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from tests.support import sources
from tests.support.sources import PACKAGE, ROOT

NAMED = re.compile(
    r"(?<![\w/.<>{}*~$:@-])(?:\.\./)*[\w.*+<>{},-]*(?:/[\w.*+<>{},-]+)*\.(?:py|pyi|cpp|hpp|md|toml|yml)\b(?![\w/*])"
    rf"|(?<![\w/.-])(?:{'|'.join(PACKAGE)}|examples|tests|docs)/[\w./*+<>{{}},-]+"
)
"""A path with an ending of this repository, or one that begins with one of its folders."""

ELSEWHERE = [
    re.compile(pattern)
    for pattern in (
        r"(\.\./)*(api|derivations)/[\w-]+\.md",  # pages that docs/build.py makes
        r"bench/results/<device>/gpu\.json",  # nobody has measured a GPU yet
        r"model-card\.md",  # beside every network that was trained
        r"linattn/mnist",  # in the cache of the user
        r"inspect\.py",  # a module of Python
    )
]
"""Names that stand for no file of this repository."""
PLACEHOLDER = re.compile(r"<\w+>|\b(?:NAME|DEVICE|MACHINE|OPERATION|ROOM)\b")


def exists(named: str, place: Path) -> bool:
    """Whether `named` is here, as seen from the file `place`: from a folder around it, or below its own folder. A page
    may name what lies anywhere."""
    named = named.rstrip(".,/")
    # Packages of the installed layout are the folders of the checkout.
    inner = named.removeprefix("linattn/")
    names = [named, inner] if inner.split("/")[0] in PACKAGE else [named]
    around = [folder for folder in place.parents if folder == ROOT or ROOT in folder.parents]
    below = (sources.name(ROOT if place.suffix == ".md" else place.parent) + "/").removeprefix("./")
    return any(
        all(_matches(pattern, around, below) for pattern in _alternatives(PLACEHOLDER.sub("*", each))) for each in names
    )


def _matches(pattern: str, around: list[Path], below: str) -> bool:
    if any(any(True for _ in folder.glob(pattern)) for folder in around if ".." not in pattern):
        return True
    if ".." in pattern:
        return (around[0] / pattern).exists()
    return any(path.startswith(below) and PurePosixPath(path).match(pattern) for path in _all_files())


@cache
def _all_files() -> list[str]:
    return [sources.name(path) for path in sources.files(".py", ".pyi", ".cpp", ".hpp", ".md")]


def _alternatives(pattern: str) -> Iterator[str]:
    """Each pattern that a pattern with braces stands for."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    for word in found[1].split(","):
        yield from _alternatives(pattern[: found.start()] + word + pattern[found.end() :])


def missing(path: Path) -> list[str]:
    return [
        f"{sources.name(path)}:{line.number}: there is no {named}"
        for line in sources.prose(path)
        for named in NAMED.findall(line.text)
        if not any(pattern.fullmatch(named) for pattern in ELSEWHERE) and not exists(named, path)
    ]


def explaining_files() -> list[Path]:
    scripts = [ROOT / "Makefile", ROOT / "CMakeLists.txt", ROOT / ".ci" / "run", ROOT / "mkdocs.yml"]
    # The changelog also says how files were called.
    return [
        path for path in sources.files(".py", ".cpp", ".hpp", ".md", ".toml") if path.name != "CHANGELOG.md"
    ] + scripts


def test_files_named_in_prose_exist() -> None:
    found = [fault for path in explaining_files() for fault in missing(path)]
    assert not found, "\n".join(found)


def test_a_missing_file_is_found() -> None:
    place = ROOT / "linattn" / "cost.py"
    for named in ("errors.py", "linattn/errors.py", "linattn/kernels/bindings.cpp", "kernels/<op>/ops.py", "lm/*.py"):
        assert exists(named, place), named
    for named in ("ops.py", "linattn/eroors.py", "kernels/<op>/nothing.py", "kernels/{softmax,hardmax}", "tests/x"):
        assert not exists(named, place), named
    assert exists("ops.py", ROOT / "docs" / "index.md")
    page = ROOT / "tests" / "README.md"
    assert NAMED.findall("as `kernels/none.py` (see nowhere.cpp, rnn/) and a.b/c") == ["kernels/none.py", "nowhere.cpp"]
    assert exists("conftest.py", page)
