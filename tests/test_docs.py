"""The Python of README and docs runs as it stands there, each page as one script."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^( *```)python\n(.*?)^\1", re.MULTILINE | re.DOTALL)
# Several processes: what that page shows is run by tests/distributed.
APART = ("distributed.md",)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.name not in APART and BLOCK.search(page.read_text("utf-8"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    text = page.read_text("utf-8")
    if "transformers" in text:
        pytest.importorskip("transformers")
    script = tmp_path / "page.py"
    script.write_text("\n".join(textwrap.dedent(code) for _, code in BLOCK.findall(text)), "utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
