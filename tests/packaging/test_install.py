"""Show what is shipped and how it installs: wheel, sdist, and the three ways in which this code may be on a machine.

The slow ones build distributions and make throw-away environments; they are marked `install` and run by
`pytest -m install`. They need no network: the environments borrow torch and the build tools from the interpreter that
runs the tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import linattn
from linattn.cli import info

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("autoencoders", "bench", "kernels", "rnn")


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Run a command to its end and return what it printed; a failure shows all of its output."""
    # Neither a caller's PYTHONPATH nor user packages may lend the new environment what it lacks.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = {**inherited, "PYTHONNOUSERSITE": "1", **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_environment(folder: Path) -> Path:
    """Make an environment that sees this interpreter's packages, but none of its import hooks; return its python."""
    run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder.parent)
    python = folder / "bin" / "python"
    borrowed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip()
    (Path(site) / "borrowed.pth").write_text("\n".join(borrowed))
    return python


def pip_install(python: Path, *what: str | Path, **environment: str) -> None:
    """Install into `python`'s environment with this interpreter's pip and build tools."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run([*command, "--no-build-isolation", "--force-reinstall", *what], cwd=python.parent, **environment)


def linattn_info(python: Path, cwd: Path) -> dict[str, object]:
    return json.loads(run([python, "-m", "linattn", "info", "--json"], cwd=cwd))


def check_at_the_root_of(source: Path, python: Path) -> None:
    """The two commands that must work at a repository root however the package is installed."""
    where = "import linattn.rnn, linattn.kernels; print(linattn.rnn.__file__)"
    assert Path(run([python, "-c", where], cwd=source).strip()) == source / "rnn" / "__init__.py"
    # As the `pytest` command does: without the current folder on the path.
    bare_pytest = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main())"
    closing = run(
        [python, "-c", bare_pytest, "-q", "tests/packaging/test_import.py", "tests/linattn/test_cost.py"], cwd=source
    ).splitlines()[-1]
    assert re.search(r"\d+ passed", closing)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture
def source(distributions: Path, tmp_path: Path) -> Path:
    """A fresh source tree, as the sdist unpacks."""
    (path,) = distributions.glob("*.tar.gz")
    run(["tar", "-xzf", path, "-C", tmp_path], cwd=tmp_path)
    return tmp_path / path.name.removesuffix(".tar.gz")


MODULES = {"scikit_learn": "sklearn"}


def test_info_knows_the_extras_that_pyproject_declares() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in info.EXTRAS.items():
        packages = {re.split(r"[<>=;\[]", requirement)[0].replace("-", "_") for requirement in declared[extra]}
        assert {MODULES.get(package, package) for package in packages} == set(modules), extra


@pytest.mark.install
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"linattn", f"linattn-{linattn.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".hpp"))]
    assert not [name for name in names if name.startswith("linattn/bench/results/") or "conftest" in name]
    assert [name for name in names if re.fullmatch(r"linattn/_native\..*(so|pyd)", name)]
    for room in ROOMS:
        assert f"linattn/{room}/__init__.py" in names
    assert "linattn/py.typed" in names


@pytest.mark.install
def test_sdist_holds_what_a_build_and_a_test_run_need(source: Path) -> None:
    needed = ["CMakeLists.txt", "Makefile", "LICENSE", "README.md", "kernels/bindings.cpp", "tests/conftest.py"]
    assert [name for name in needed if not (source / name).is_file()] == []


@pytest.mark.install
def test_checkout_works_uninstalled(source: Path, tmp_path: Path) -> None:
    check_at_the_root_of(source, make_environment(tmp_path / "env"))


@pytest.mark.install
def test_plain_install_works_elsewhere_and_at_the_root(wheel: Path, source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    pip_install(python, wheel)
    where = "import linattn.rnn, linattn.bench; print(linattn.rnn.__file__)"
    assert Path(run([python, "-c", where], cwd=tmp_path).strip()).is_relative_to(tmp_path / "env")
    assert linattn_info(python, tmp_path)["native"]["present"] is True
    check_at_the_root_of(source, python)
    # The checkout's own Python sources run there, with the compiled module of the install.
    assert linattn_info(python, source)["native"]["present"] is True


@pytest.mark.install
def test_editable_install_works_elsewhere_and_at_the_root(source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    pip_install(python, "--editable", source)
    where = "import linattn.rnn, linattn.bench; print(linattn.rnn.__file__)"
    assert Path(run([python, "-c", where], cwd=tmp_path).strip()) == source / "rnn" / "__init__.py"
    assert linattn_info(python, tmp_path)["native"]["present"] is True
    check_at_the_root_of(source, python)


@pytest.mark.install
def test_install_without_a_compiler_says_so(source: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    pip_install(python, source, CC="/bin/false", CXX="/bin/false")
    native = linattn_info(python, tmp_path)["native"]
    assert native["present"] is False
    assert "no working C++20 compiler" in native["reason"]


@pytest.mark.install
def test_console_script_is_installed(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    pip_install(python, wheel)
    assert run([python.parent / "linattn", "--version"], cwd=tmp_path) == f"linattn {linattn.__version__}\n"
