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


KERNEL_SOURCES = ("*.py", "*.cpp", "*.hpp")


@dataclass(frozen=True)
class Environment(environment.Environment):
    """`sources` is the same before and after a commit that does not touch what is measured, nor how."""

    sources: str

    def comparable(self) -> tuple[object, ...]:
        """Return what must agree where measurements stand in one file."""
        return (self.slug, self.device, self.threads, self.torch, self.triton, self.sources)


def describe(device: torch.device) -> Environment:
    """Look at the machine and the code now. Nothing here fails: what cannot be found out is None."""
    digest = hashlib.sha256()
    for name, file in measured_sources().items():
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return Environment(**asdict(environment.describe(device)), sources=digest.hexdigest()[:12])


def measured_sources() -> dict[str, Path]:
    """Find the files that decide how fast an operation is and how that is measured.

    These are the public functions and all they call in Python, the kernels, and the parts of the bench that make the
    inputs and take the time. C++ counts by its sources, so that every build of a checkout has the same fingerprint; an
    installed package has none, and there the native module itself counts.

    Returns:
        each file under its place in the package, in alphabetical order.
    """
    package = Path(linattn.__file__).resolve().parent
    bench = Path(__file__).resolve().parent
    files = {name: package / name for name in ("functional.py", "feature_maps.py", "cost.py")}
    files |= {f"_dispatch/{file.name}": file for file in (package / "_dispatch").glob("*.py")}
    files |= {f"bench/{name}": bench / name for name in ("cases.py", "measure.py", "timing.py")}
    kernels = _origin("linattn.kernels")
    if kernels is not None:
        sources = [file for end in KERNEL_SOURCES for file in kernels.parent.rglob(end)]
        files |= {f"kernels/{file.relative_to(kernels.parent).as_posix()}": file for file in sources}
    native = _origin("linattn._native")
    if native is not None and not any(name.endswith(".cpp") for name in files):
        files["_native"] = native
    return {name: files[name] for name in sorted(files) if files[name].is_file()}


def _origin(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin)
