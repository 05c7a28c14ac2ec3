"""Show what `import linattn` brings in, and where it finds its parts."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from linattn._util import source_tree

ROOT = Path(__file__).resolve().parents[2]


def fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter at the repository root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_adds_no_heavy_module_to_those_that_torch_loads() -> None:
    heavy = {"triton", "matplotlib", "tqdm", "sklearn", "pytest"}
    done = fresh_python(
        "import sys, torch; before = set(sys.modules); import linattn; print(*set(sys.modules) - before)"
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "linattn" in loaded
    assert not loaded & heavy


def test_rooms_import_at_the_repository_root() -> None:
    rooms = ["kernels", "rnn", "autoencoders", "bench"]
    done = fresh_python("; ".join(f"import linattn.{room}; print(linattn.{room}.__file__)" for room in rooms))
    assert done.returncode == 0, done.stderr
    assert [Path(line) for line in done.stdout.splitlines()] == [ROOT / room / "__init__.py" for room in rooms]


def test_kernels_refuses_to_be_a_top_level_package() -> None:
    done = fresh_python("from kernels import quadratic")
    assert done.returncode == 1
    assert "import linattn.kernels" in done.stderr.splitlines()[-1]
    assert fresh_python("import kernels.quadratic").returncode == 1
    # transformers looks at the version of whatever answers to that name, and must find it too old.
    assert fresh_python("import kernels; assert kernels.__version__ == '0'").returncode == 0


def test_search_path_is_left_alone_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "linattn"
    installed.mkdir(parents=True)
    monkeypatch.setattr(source_tree, "__file__", str(installed / "_util" / "source_tree.py"))
    assert source_tree.search_path([str(installed)]) == [str(installed)]


def test_search_path_of_a_checkout_ends_with_the_folder_of_an_installed_native_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "linattn"
    installed.mkdir()
    (installed / f"_native{EXTENSION_SUFFIXES[0]}").touch()
    without_native = tmp_path / "other" / "linattn"
    without_native.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(without_native.parent), str(tmp_path)])
    monkeypatch.setattr(source_tree, "__file__", str(ROOT / "linattn" / "_util" / "source_tree.py"))
    package = str(ROOT / "linattn")
    assert source_tree.search_path([package]) == [package, str(ROOT), str(installed)]
