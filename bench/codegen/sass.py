"""Inspect NVIDIA's machine code: SASS and the log of ptxas."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from linattn.bench.codegen.machine_code import (
    CHIPS,
    Chip,
    Clocks,
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

KINDS = {"HGMMA": "HGMMA", "HMMA": "HMMA", "UTCHMMA": "tcgen05"}
HALF_RATE = (
    *("PRMT", "LOP3", "IADD3", "SEL", "FSEL", "ISETP", "FSETP", "SHF", "LEA", "IABS", "IMNMX", "VIADD", "VIMNMX"),
    *("VIADDMNMX", "FMNMX", "PLOP3", "SGXT", "POPC", "F2FP", "F2F"),
)
FMA = ("FFMA", "FMUL", "FADD", "HMUL2", "HFMA2", "HADD2", "IMAD")
SHARED = ("LDS", "STS", "LDSM", "STSM")
GLOBAL_READS, GLOBAL_WRITES = ("LDG", "LDGSTS"), ("STG", "RED")
LOCAL = ("LDL", "STL")

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?);")


def inspect(kernel: OfflineKernel) -> Inspection:
    """Inspect a kernel compiled for sm_80 or newer."""
    code = parse(kernel.assembly)
    warps, chip = kernel.num_warps, CHIPS[kernel.architecture]
    count = Counter(KINDS[_base(x)] for x in code if _base(x) in KINDS)
    loops = [_loop(body, warps, chip) for body in innermost_loops(code, lambda x: _base(x) in KINDS)]
    memory_loops = [_loop(body, warps, chip) for body in innermost_loops(code, lambda x: _base(x) in GLOBAL_READS)]
    registers = _number(r"Used (\d+) registers", kernel.log)
    return Inspection(
        architecture=kernel.architecture,
        registers=registers,
        spill_bytes=_number(r"(\d+) bytes spill stores", kernel.log),
        shared_bytes=kernel.shared_bytes,
        programs=programs_that_fit(kernel.architecture, registers, warps, kernel.shared_bytes),
        matrix=dict(count),
        serialized=[line.strip() for line in kernel.log.splitlines() if "wgmma" in line and "serialized" in line],
        hot=hottest(loops, memory_loops, _loop(code, warps, chip)),
        loops=loops,
    )


def parse(text: str) -> list[Instruction]:
    """Parse cuobjdump's listing into instructions."""
    code = []
    for line in text.splitlines():
        found = _LINE.match(line)
        if found:
            position, name, operands = int(found[1], 16), found[2], found[3].strip()
            target = re.search(r"(0x[0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
            code.append(Instruction(position, name, operands, int(target[1], 16) if target else None))
    return code


def _loop(body: Sequence[Instruction], warps: int, chip: Chip) -> Loop:
    count = Counter(map(_base, body))
    return Loop(
        instructions=len(body),
        matrix=sum(count[name] for name in KINDS),
        flops=sum(_flops(x, warps) for x in body),
        bytes_read=sum(_width(x) for x in body if _base(x) in GLOBAL_READS) * 32 * warps,
        bytes_written=sum(_width(x) for x in body if _base(x) in GLOBAL_WRITES) * 32 * warps,
        full_waits=sum(x.name.startswith("WARPGROUP.DEPBAR") and x.operands.endswith("0x0") for x in body),
        spills=sum(count[name] for name in LOCAL),
        clocks=_clocks(body, count, warps, chip) if chip.flops_16bit else None,
    )


def _clocks(body: Sequence[Instruction], count: Counter[str], warps: int, chip: Chip) -> Clocks:
    """Count clocks: four schedulers start an instruction a clock each; a warp of 32 takes 16 lanes for 2 clocks."""
    issue = len(body) * warps / 4
    return Clocks(
        matrix=sum(_matrix_clocks(x, warps, chip) for x in body),
        issue=issue,
        other_issue=issue - sum(count[name] for name in KINDS) * warps / 4,
        integer=sum(count[name] for name in HALF_RATE) * warps / 2,
        fma=sum(count[name] for name in FMA) * warps * 32 / chip.lanes,
        special=count["MUFU"] * warps * 2,
        shared=sum(_shared_clocks(x) for x in body) * warps,
        operands=sum(_operand_clocks(x) for x in body) * warps / 4,
    )


def _flops(instruction: Instruction, warps: int) -> int:
    """Count those of a whole program. HGMMA is one instruction of 4 warps; tcgen05 keeps its shape in a register."""
    kind = _base(instruction)
    if kind == "HGMMA":
        rows, columns, depth = map(int, instruction.name.split(".")[1].split("x"))
        return 2 * rows * columns * depth * warps // 4
    if kind == "HMMA":
        depth = int(re.findall(r"168(\d+)", instruction.name)[0])
        return 2 * 16 * 8 * depth * warps
    return 0


def _matrix_clocks(instruction: Instruction, warps: int, chip: Chip) -> float:
    rate = chip.flops_16bit / (2 if "TF32" in instruction.name else 1)
    share = chip.hmma_share if _base(instruction) == "HMMA" else 1.0
    return _flops(instruction, warps) / (rate * share)


def _shared_clocks(instruction: Instruction) -> float:
    """Count those of one warp at 128 bytes a clock, free of bank conflicts; at least one."""
    kind = _base(instruction)
    if kind == "LDGSTS" or kind in SHARED:
        return max(1.0, _width(instruction) * 32 / 128)
    return 0.0


def _operand_clocks(instruction: Instruction) -> float:
    """Count those of four warps: HGMMA loads its second operand, and the first if no register, from shared memory."""
    if _base(instruction) != "HGMMA":
        return 0.0
    columns = int(instruction.name.split("x")[1])
    first_in_shared = instruction.operands.split(",")[1].strip().startswith("gdesc")
    return columns / 4 + (16 if first_in_shared else 0)


def _width(instruction: Instruction) -> int:
    """Return the bytes that one thread moves."""
    matrices = re.search(r"\.MT?88(?:\.(\d))?", instruction.name)
    if matrices:
        return 4 * int(matrices[1] or 1)
    for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if suffix in instruction.name:
            return width
    return 4


def _base(instruction: Instruction) -> str:
    return instruction.name.split(".")[0]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"ptxas's log does not say {pattern!r}:\n{text}"
    return int(found[1])
