"""The examples run: those in docstrings, and the Python of README and docs, each page as one script."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import linattn

ROOT = Path(__file__).parents[2]
ROOMS = ("linattn", "autoencoders", "bench", "kernels", "rnn")
BLOCK = re.compile(r"^( *```)python\n(.*?)^\1", re.MULTILINE | re.DOTALL)
# Several processes: what that page shows is run by tests/linattn/distributed.
APART = ("distributed.md",)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.name not in APART and BLOCK.search(page.read_text("utf-8"))
]


def _modules() -> list[str]:
    """The modules of the source tree that hold an example, without those that need others' packages."""
    names = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.parent.name == "integrations":
                continue  # tests/linattn/integrations runs them
            if ">>>" in path.read_text(encoding="utf-8"):
                inside = path.relative_to(ROOT).with_suffix("").parts
                names.append(".".join(inside if room == "linattn" else ("linattn", *inside)).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    torch.manual_seed(0)
    outcome = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, "linattn": linattn})
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text("utf-8")
    if "transformers" in text:
        pytest.importorskip("transformers")
    script = tmp_path / "page.py"
    script.write_text("\n".join(textwrap.dedent(code) for _, code in BLOCK.findall(text)), "utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
