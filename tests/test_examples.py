"""Every example in a docstring and the one in the README run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import linattn

ROOT = Path(__file__).parents[1]
ROOMS = ("linattn", "autoencoders", "bench", "kernels", "rnn")


def _modules() -> list[str]:
    """The modules of the source tree that hold an example, without those that need others' packages."""
    names = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.parent.name == "integrations":
                continue  # tests/integrations runs them
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


def test_readme_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
