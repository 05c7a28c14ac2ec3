"""From a recorded launch to what its machine code says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.bench.codegen import amdgcn, sass
from linattn.bench.codegen.offline import TARGETS, compiled

if TYPE_CHECKING:
    from linattn.bench.codegen.machine_code import Reading
    from linattn.kernels.common.gpu.launch import Launch

_readings: dict[str, Reading] = {}


def read(launch: Launch, architecture: str) -> Reading:
    """Compile a launch for an architecture and read the code. Launches that share a binary are read once."""
    kernel = compiled(launch, architecture)
    if kernel.key not in _readings:
        reader = amdgcn if TARGETS[architecture].backend == "hip" else sass
        _readings[kernel.key] = reader.read(kernel)
    return _readings[kernel.key]
