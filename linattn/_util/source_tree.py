"""Where the parts of the package lie when it is imported from a checkout.

Installed, everything lies inside one folder `linattn/` and there is nothing to do. In the repository `kernels/`,
`rnn/`, `bench/`, ... stand beside `linattn/`, and the compiled module lies wherever an install put it; running Python
at the repository root finds the bare `./linattn` first, installed or not.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def search_path(package_path: Iterable[str]) -> list[str]:
    """Return the package's `__path__`; in a checkout, with the repository root and the native module's folder.

    In this order a checkout's own Python sources win over an installed copy, which only adds what the checkout lacks.
    """
    found = list(package_path)
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / "kernels" / "bindings.cpp").is_file():
        return found
    installed = [folder for entry in sys.path if _holds_native_module(folder := Path(entry) / "linattn")]
    found += [str(folder) for folder in (root, *installed) if str(folder) not in found]
    return found


def _holds_native_module(folder: Path) -> bool:
    return any((folder / f"_native{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
