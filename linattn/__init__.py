"""linattn: attention that is a kernel over its inputs."""

from __future__ import annotations

import pathlib

__version__ = "0.1.0"

# The repository keeps `kernels/`, `rnn/`, ... beside `linattn/`; they import as `linattn.kernels`, ... also in a bare checkout.
_parent = pathlib.Path(__file__).resolve().parent.parent
if (_parent / "kernels" / "common").is_dir() and (_parent / "pyproject.toml").is_file():
    __path__.append(str(_parent))
