"""Limits on the machine code of a kernel, and how it breaks them."""

from __future__ import annotations

from typing import NamedTuple

from linattn.bench.codegen.machine_code import CHIPS, Inspection

MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA"}
"""The instruction of the fast path, on the architectures where kernels are required."""


class Limits(NamedTuple):
    """The limits of one kernel on one architecture."""

    issue: float | None
    """Instructions issued per clock of matrix work in the hot loop: a kernel above 1 cannot fill the matrix unit.
    None: a kernel without matrix products."""
    full_waits: int = 0
    """Per pass of the hot loop."""
    spill_bytes: int = 128
    """Outside the hot loop: before it, or where scores are hidden, in a tile or two for each tile of queries."""
    programs: int = 1
    """On a multiprocessor at once."""


def violations(inspection: Inspection, limits: Limits) -> list[str]:
    """Describe how a kernel breaks its limits; [] if it does not."""
    found = list(_resources(inspection, limits))
    if limits.issue is not None:
        found += _matrix_path(inspection)
        found += _hot_loop(inspection, limits, limits.issue)
    return found


def _resources(inspection: Inspection, limits: Limits) -> list[str]:
    chip, found = CHIPS[inspection.architecture], []
    if inspection.shared_bytes > chip.shared_per_program:
        found.append(f"{inspection.shared_bytes} bytes of shared memory, at most {chip.shared_per_program} exist")
    elif inspection.programs < limits.programs:
        found.append(f"{inspection.programs} programs fit a multiprocessor, {limits.programs} are meant to")
    if inspection.spill_bytes > limits.spill_bytes:
        found.append(f"{inspection.spill_bytes} bytes of registers spilled, limit {limits.spill_bytes}")
    return found


def _matrix_path(inspection: Inspection) -> list[str]:
    wanted, found = MATRIX_UNIT[inspection.architecture], []
    others = [kind for kind in inspection.matrix if kind != wanted]
    if wanted not in inspection.matrix:
        found.append(f"no {wanted} instruction")
    if others:
        found.append(f"{', '.join(others)} instructions beside {wanted}")
    if inspection.serialized:
        found.append(f"serialized: {inspection.serialized[0]}")
    return found


def _hot_loop(inspection: Inspection, limits: Limits, issue_limit: float) -> list[str]:
    hot, clocks, found = inspection.hot, inspection.hot.clocks, []
    assert clocks is not None, f"no clocks are estimated on {inspection.architecture}"
    if hot.spills:
        found.append(f"{hot.spills} loads and stores of spilled registers in the hot loop")
    if hot.full_waits > limits.full_waits:
        found.append(f"{hot.full_waits} full waits in the hot loop, limit {limits.full_waits}")
    if not clocks.matrix:
        found.append("no matrix product in the hot loop")
    elif clocks.issue / clocks.matrix > issue_limit:
        found.append(f"{clocks.issue / clocks.matrix:.2f} instructions per matrix clock, limit {issue_limit:.2f}")
    return found
