"""How large a file, a function and a folder may be."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support import sources
from tests.support.sources import CPP, PACKAGE, ROOT

FILE_LINES = 400
FUNCTION_LINES = 60
REASON = "long because"
"""A longer function says why in its docstring or its first comment, in these words."""
FOLDER_FILES = 15
PUBLIC_FILES = 12
"""In linattn/ itself, where only the public library stands."""
LARGER_FOLDERS = {
    "kernels/quadratic/gpu": "one kernel beside its launch a file, as few as fit the length of a file",
}
LONGER_FILES = {
    "kernels/quadratic/gpu/chunk_state.py": "the kernels that make a state beside their launches, one argument a line",
    "kernels/quadratic/gpu/decode.py": "the kernels of a step beside their launches, one argument a line",
    "linattn/decode.py": "two thirds are docstrings and checks of one class family",
    "linattn/feature_maps.py": "one class a map, every argument documented in place",
    "linattn/functional.py": "the public functions: every argument of every one is documented in place",
    "tests/linattn/test_decode.py": "one subject",
    "tests/linattn/training/test_trainer.py": "one subject",
}
"""Files that may be longer, and why."""
CONTROL = {"if", "for", "while", "switch", "catch", "constexpr"}


def long_python_functions(text: str) -> list[str]:
    """Functions whose body has too many lines, and that give no reason. Neither docstring nor parameters count: a
    Triton kernel has one a line."""
    lines = text.split("\n")
    found = []
    for node in sources.python_functions(text):
        docstring, first = ast.get_docstring(node) or "", node.body[0]
        length = (node.end_lineno or 0) - ((first.end_lineno or 0) if docstring else first.lineno - 1)
        comments = [line for line in lines[node.lineno - 1 : node.end_lineno] if line.lstrip().startswith("#")]
        if length > FUNCTION_LINES and REASON not in f"{docstring} {' '.join(comments[:2])}".lower():
            found.append(f"{node.lineno}: {node.name} has {length} lines")
    return found


def long_cpp_functions(text: str) -> list[str]:
    """Functions of too many lines, from the brace that opens the body to the one that closes it."""
    code = sources.without_cpp_comments(text)
    found: list[str] = []
    position = 0
    while (opening := code.find("{", position)) >= 0:
        position = opening + 1
        if not _opens_a_function(code[:opening]):
            continue
        closing = _closing_brace(code, opening)
        first, last = (code.count("\n", 0, at) + 1 for at in (opening, closing))
        length = last - first + 1
        lines = text.split("\n")
        start = first - 1
        while start > 0 and lines[start - 1].strip():
            start -= 1
        if length > FUNCTION_LINES and REASON not in "\n".join(lines[start : first + 2]).lower():
            found.append(f"{first}: {lines[first - 1].strip()} has {length} lines")
        position = closing
    return found


def _opens_a_function(before: str) -> bool:
    """Whether a brace after this text opens the body of a function: it follows a list of parameters."""
    head = re.sub(r"\b(const|noexcept|override|final|mutable)\s*$", "", before.rstrip()).rstrip()
    head = re.sub(r"->\s*[\w:<>,&*\s]+$", "", head).rstrip()
    if not head.endswith(")"):
        return False
    depth = 0
    for at in range(len(head) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(head[at], 0)
        if depth == 0:
            word = re.search(r"(\w+|\])\s*$", head[:at])
            return word is not None and word[1] not in {*CONTROL, "]"}
    return False


def _closing_brace(code: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(code)):
        depth += {"{": 1, "}": -1}.get(code[at], 0)
        if depth == 0:
            return at
    return len(code) - 1


@pytest.mark.parametrize("suffix", [".py", *CPP])
def test_no_file_is_long(suffix: str) -> None:
    found = [
        f"{sources.name(path)} has {lines} lines"
        for path in sources.files(suffix)
        if (lines := path.read_text(encoding="utf-8").count("\n")) > FILE_LINES
        and sources.name(path) not in LONGER_FILES
    ]
    assert not found, "\n".join(found)


def test_files_that_may_be_long_are_long() -> None:
    assert [name for name in LONGER_FILES if (ROOT / name).read_text(encoding="utf-8").count("\n") <= FILE_LINES] == []


def test_no_python_function_is_long_without_a_reason() -> None:
    found = [
        f"{sources.name(path)}:{fault}"
        for path in sources.files(".py")
        for fault in long_python_functions(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_no_cpp_function_is_long_without_a_reason() -> None:
    found = [
        f"{sources.name(path)}:{fault}"
        for path in sources.files(*CPP)
        for fault in long_cpp_functions(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_no_folder_of_the_package_is_full() -> None:
    # A header and its source are one file to a reader.
    files = {path.with_suffix("") for path in sources.files(".py", *CPP, folders=PACKAGE)}
    counts = Counter(path.parent for path in files if path.name != "__init__")
    full = {sources.name(folder): count for folder, count in counts.items() if count > FOLDER_FILES}
    assert set(full) - set(LARGER_FOLDERS) == set(), full
    assert set(LARGER_FOLDERS) - set(full) == set(), "no longer larger: take it from the list"
    assert counts[ROOT / "linattn"] <= PUBLIC_FILES


def test_a_long_function_is_found_and_a_reason_accepted() -> None:
    body = "    x = 1\n" * (FUNCTION_LINES + 1)
    assert long_python_functions(f"def f():\n{body}") == [f"1: f has {FUNCTION_LINES + 1} lines"]
    assert long_python_functions(f'def f():\n    """Do it.\n\n    Long because it is one loop."""\n{body}') == []
    assert long_python_functions(f"def f():\n    # Long because it is one loop.\n{body}") == []
    assert long_python_functions(f'def f():\n    """Docstring.{body}"""\n') == []


def test_a_long_function_in_cpp_is_found_and_a_reason_accepted() -> None:
    body = "  if (x) { x = '}'; }\n" * FUNCTION_LINES
    (found,) = long_cpp_functions(f"namespace n {{\nint f(int x) noexcept {{\n{body}}}\n}}\n")
    assert found == f"2: int f(int x) noexcept {{ has {FUNCTION_LINES + 2} lines"
    assert long_cpp_functions(f"namespace n {{\n// Long because it is one loop.\nint f(int x) {{\n{body}}}\n}}\n") == []
    assert long_cpp_functions(f"struct S {{\n{body}}};\n") == []


def test_folders_are_those_of_the_package() -> None:
    assert all((ROOT / folder / "__init__.py").is_file() for folder in PACKAGE)
    assert Path(__file__) in sources.files(".py")
