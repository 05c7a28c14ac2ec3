"""What the machine code of a kernel must not look like."""

from __future__ import annotations

from typing import NamedTuple

from linattn.bench.codegen.machine_code import CHIPS, Reading

MATRIX_UNIT = {"sm_80": "HMMA", "sm_90": "HGMMA"}
"""The instruction of the fast path, by the architectures that are gated."""


class Limits(NamedTuple):
    """Of one kernel on one architecture."""

    issue: float | None
    """Instructions issued per clock of matrix work in the hot loop: a kernel above 1 cannot fill the matrix unit.
    None: a kernel without matrix products."""
    full_waits: int = 0
    """Per pass of the hot loop."""
    spill_bytes: int = 128
    """Outside the hot loop: before it, or where pairs are hidden, in a tile or two of each row of tiles."""
    programs: int = 1
    """On a multiprocessor at once."""


def violations(reading: Reading, limits: Limits) -> list[str]:
    """What is wrong with a kernel, in words; [] if nothing."""
    found = list(_resources(reading, limits))
    if limits.issue is not None:
        found += _matrix_path(reading)
        found += _hot_loop(reading, limits, limits.issue)
    return found


def _resources(reading: Reading, limits: Limits) -> list[str]:
    chip, found = CHIPS[reading.architecture], []
    if reading.shared_bytes > chip.shared_per_program:
        found.append(f"{reading.shared_bytes} bytes of shared memory, at most {chip.shared_per_program} exist")
    elif reading.programs < limits.programs:
        found.append(f"{reading.programs} programs fit a multiprocessor, {limits.programs} are meant to")
    if reading.spill_bytes > limits.spill_bytes:
        found.append(f"{reading.spill_bytes} bytes of registers spilled, limit {limits.spill_bytes}")
    return found


def _matrix_path(reading: Reading) -> list[str]:
    wanted, found = MATRIX_UNIT[reading.architecture], []
    others = [kind for kind in reading.matrix if kind != wanted]
    if wanted not in reading.matrix:
        found.append(f"no {wanted} instruction")
    if others:
        found.append(f"{', '.join(others)} instructions beside {wanted}")
    if reading.serialized:
        found.append(f"serialized: {reading.serialized[0]}")
    return found


def _hot_loop(reading: Reading, limits: Limits, issue_limit: float) -> list[str]:
    hot, clocks, found = reading.hot, reading.hot.clocks, []
    assert clocks is not None, f"no clocks are estimated on {reading.architecture}"
    if hot.spills:
        found.append(f"{hot.spills} loads and stores of spilled registers in the hot loop")
    if hot.full_waits > limits.full_waits:
        found.append(f"{hot.full_waits} full waits in the hot loop, limit {limits.full_waits}")
    if not clocks.matrix:
        found.append("no matrix product in the hot loop")
    elif clocks.issue / clocks.matrix > issue_limit:
        found.append(f"{clocks.issue / clocks.matrix:.2f} instructions per matrix clock, limit {issue_limit:.2f}")
    return found
