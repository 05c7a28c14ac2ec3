"""Inspect a recorded launch: compile it and count what its machine code holds.

Not `inspect.py`: beside page.py, which runs as a script, that would hide the module of Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.bench.codegen import amdgcn, sass
from linattn.bench.codegen.offline import TARGETS, compile_offline

if TYPE_CHECKING:
    from linattn.bench.codegen.machine_code import Inspection
    from linattn.kernels.common.gpu.launch import Launch

_inspections: dict[str, Inspection] = {}


def inspect_launch(launch: Launch, architecture: str) -> Inspection:
    """Compile a launch for an architecture and inspect the code. Launches that share a binary are inspected once."""
    kernel = compile_offline(launch, architecture)
    if kernel.key not in _inspections:
        machine = amdgcn if TARGETS[architecture].backend == "hip" else sass
        _inspections[kernel.key] = machine.inspect(kernel)
    return _inspections[kernel.key]
