"""Inspect AMD's assembly, as far as it goes: resources, matrix instructions and memory traffic, no clocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from linattn.bench.codegen.machine_code import (
    Inspection,
    Instruction,
    Loop,
    hottest,
    innermost_loops,
    programs_that_fit,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linattn.bench.codegen.offline import OfflineKernel

_LABEL = re.compile(r"^(\.LBB\w+):")
_LINE = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}


def inspect(kernel: OfflineKernel) -> Inspection:
    """Inspect a kernel compiled for gfx942."""
    code = parse(kernel.assembly)
    loops = [_loop(body, kernel.num_warps) for body in innermost_loops(code, _is_matrix)]
    memory_loops = [_loop(body, kernel.num_warps) for body in innermost_loops(code, _is_read)]
    registers = _field("vgpr_count", kernel.assembly)
    return Inspection(
        architecture=kernel.architecture,
        registers=registers,
        spill_bytes=4 * _field("vgpr_spill_count", kernel.assembly),
        shared_bytes=kernel.shared_bytes,
        programs=programs_that_fit(kernel.architecture, registers, kernel.num_warps, kernel.shared_bytes),
        matrix={"MFMA": sum(map(_is_matrix, code))} if any(map(_is_matrix, code)) else {},
        serialized=[],
        hot=hottest(loops, memory_loops, _loop(code, kernel.num_warps)),
        loops=loops,
    )


def parse(text: str) -> list[Instruction]:
    """Parse the assembler's input into instructions; a position is a line."""
    lines = text.splitlines()
    labels = {found[1]: index for index, line in enumerate(lines) if (found := _LABEL.match(line))}
    code = []
    for index, line in enumerate(lines):
        found = _LINE.match(line)
        label = _LABEL.match(line)
        if label:
            code.append(Instruction(index, "label", ""))
        elif found:
            name, operands = found[1], found[2].strip()
            is_jump = name == "s_branch" or name.startswith("s_cbranch")
            code.append(Instruction(index, name, operands, labels.get(operands) if is_jump else None))
    return code


def _loop(body: Sequence[Instruction], warps: int) -> Loop:
    return Loop(
        instructions=sum(x.name != "label" for x in body),
        matrix=sum(map(_is_matrix, body)),
        flops=sum(_flops(x) for x in body) * warps,
        bytes_read=sum(_width(x) for x in body if _is_read(x)) * 64 * warps,
        bytes_written=sum(_width(x) for x in body if _is_write(x)) * 64 * warps,
        full_waits=0,
        spills=sum(x.name.startswith("scratch_") for x in body),
        clocks=None,
    )


def _is_matrix(instruction: Instruction) -> bool:
    return instruction.name.startswith("v_mfma_")


def _is_read(instruction: Instruction) -> bool:
    return instruction.name.startswith(("global_load", "buffer_load"))


def _is_write(instruction: Instruction) -> bool:
    return instruction.name.startswith(("global_store", "buffer_store"))


def _flops(instruction: Instruction) -> int:
    """Count those of one warp's product. v_mfma_f32_32x32x8_bf16: rows, columns and depth of one warp's product."""
    found = re.search(r"_(\d+)x(\d+)x(\d+)", instruction.name) if _is_matrix(instruction) else None
    return 2 * int(found[1]) * int(found[2]) * int(found[3]) if found else 0


def _width(instruction: Instruction) -> int:
    return next((width for name, width in _WIDTH.items() if name in instruction.name), 4)


def _field(name: str, text: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    assert found, f"no {name} in the assembly"
    return int(found[1])
