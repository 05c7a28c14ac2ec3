"""The environment of a measurement: machine, versions, and a fingerprint of the code that is measured."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import linattn
from linattn._util import environment

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Environment(environment.Environment):
    """`sources` is the same before and after a commit that does not touch what is measured, nor how."""

    sources: str

    def comparable(self) -> tuple[object, ...]:
        """Rows may stand in one file only where all of this agrees."""
        return (self.slug, self.device, self.threads, self.torch, self.triton, self.sources)


def describe(device: torch.device) -> Environment:
    """Look at the machine and the code now. Nothing here fails: what cannot be found out is None."""
    digest = hashlib.sha256()
    for file in measured_sources():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return Environment(**asdict(environment.describe(device)), sources=digest.hexdigest()[:12])


def measured_sources() -> list[Path]:
    """What decides how fast an operation is and how that is measured.

    These are the public functions and all they call in Python, the kernels, the native module, and the parts of the
    bench that make the inputs and take the time.
    """
    package = Path(linattn.__file__).resolve().parent
    bench = Path(__file__).resolve().parent
    files = [package / name for name in ("functional.py", "feature_maps.py", "cost.py")]
    files += (package / "_dispatch").glob("*.py")
    files += [bench / f"{name}.py" for name in ("cases", "measure", "timing")]
    for name in ("linattn.kernels", "linattn._native"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            files += origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
    return sorted(file for file in files if file.is_file())
