"""The files of this repository and what stands in them, for the tests that keep the house."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("linattn", "kernels", "autoencoders", "rnn", "bench")
"""The folders that make up the package; each file below one is shipped."""
FOLDERS = (*PACKAGE, "examples", "tests", "docs", ".ci")
GENERATED = ("__pycache__", "results", "egg-info")
CPP = (".cpp", ".hpp")


class Line(NamedTuple):
    number: int
    text: str


def files(*suffixes: str, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """List the files of `folders` that end in one of `suffixes`, and with all folders those beside them."""
    found = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.is_file() and not set(path.relative_to(ROOT).parts) & set(GENERATED)
    ]
    if folders == FOLDERS:
        found += [path for path in ROOT.iterdir() if path.suffix in suffixes and path.is_file()]
    return sorted(found)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Every docstring with the line it begins in, and every string that stands under an assignment as its docstring."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def python_prose(text: str) -> Iterator[Line]:
    """Every line of a comment or a docstring."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Line(token.start[0], token.string)
    for first, docstring in docstrings(text):
        for offset, line in enumerate(docstring.split("\n")):
            yield Line(first + offset, line)


def without_cpp_comments(text: str) -> str:
    """C++ with each comment and each literal replaced by spaces; lines stay where they are."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|R"\(.*?\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def cpp_prose(text: str) -> Iterator[Line]:
    """Every line of a comment."""
    for found in re.finditer(r"//[^\n]*|/\*.*?\*/", text, re.DOTALL):
        first = text.count("\n", 0, found.start()) + 1
        for offset, line in enumerate(found[0].split("\n")):
            yield Line(first + offset, line)


def prose(path: Path) -> list[Line]:
    """The lines that explain: comments and docstrings of a source file, comments of a script, all of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return list(python_prose(text))
    if path.suffix in CPP:
        return list(cpp_prose(text))
    lines = [Line(number, line) for number, line in enumerate(text.split("\n"), 1)]
    if path.suffix == ".md":
        return lines
    return [Line(number, line[line.index("#") :]) for number, line in lines if "#" in line]
