"""From a recorded launch to what its machine code says."""

from __future__ import annotations

from . import amdgcn, sass
from .compiled import TARGETS, compiled
from .launch import Launch
from .machine_code import Reading

_readings: dict[str, Reading] = {}


def read(launch: Launch, architecture: str) -> Reading:
    """Compile a launch for an architecture and read the code. Launches that share a binary are read once."""
    kernel = compiled(launch, architecture)
    if kernel.key not in _readings:
        reader = amdgcn if TARGETS[architecture].backend == "hip" else sass
        _readings[kernel.key] = reader.read(kernel)
    return _readings[kernel.key]
