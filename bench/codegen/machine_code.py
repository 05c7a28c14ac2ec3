"""Resources, matrix instructions, loops and clocks of a kernel, from its machine code, before it has run anywhere.

`inspection.inspect_launch` returns an `Inspection`. sass.py parses NVIDIA's code, amdgcn.py AMD's. Nothing here is
measured: clocks are counted from instructions and the rates in `CHIPS`, without latencies, bank conflicts, cache misses
or lower clocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Chip(NamedTuple):
    """One multiprocessor."""

    shared_per_program: int
    shared: int
    registers: int
    warps: int
    flops_16bit: int = 0
    """Per clock, of the matrix units; fp32 inputs rounded to TF32 run at half of it. 0: no clocks are estimated."""
    lanes: int = 0
    """Lanes for plain fp32 arithmetic."""
    hmma_share: float = 1.0
    """Share of the matrix units' rate that the older, synchronous instructions reach (published microbenchmarks)."""


CHIPS = {
    "sm_80": Chip(163 * 1024, 164 * 1024, 65536, 64, flops_16bit=2048, lanes=64),
    "sm_90": Chip(227 * 1024, 228 * 1024, 65536, 64, flops_16bit=4096, lanes=128, hmma_share=0.62),
    "sm_100": Chip(227 * 1024, 228 * 1024, 65536, 64),
    "gfx942": Chip(64 * 1024, 64 * 1024, 131072, 32),
}


class Clocks(NamedTuple):
    """How long each unit of a multiprocessor is busy with one pass of one program through a loop."""

    matrix: float
    issue: float
    """Clocks of all instructions."""
    other_issue: float
    """Clocks of all but the matrix instructions."""
    integer: float
    fma: float
    special: float
    shared: float
    """Shared memory for all but the matrix instructions."""
    operands: float
    """Shared memory for what the matrix instructions read themselves."""

    @property
    def serial(self) -> float:
        """Share of the time in which the matrix unit works if nothing else is done meanwhile."""
        rest = max(self.other_issue, self.integer, self.fma, self.special, self.shared)
        return self.matrix / (self.matrix + rest) if self.matrix else 0.0

    @property
    def overlapped(self) -> float:
        """The same if all units work side by side, as with other programs on the multiprocessor they do in part."""
        busiest = max(self.issue, self.integer, self.fma, self.special, self.shared + self.operands)
        return self.matrix / max(self.matrix, busiest) if self.matrix else 0.0


class Loop(NamedTuple):
    """One pass of one program, with all its warps, through a loop's body: a tile."""

    instructions: int
    """Count for one warp."""
    matrix: int
    """Matrix instructions among them."""
    flops: int
    """Work of the matrix instructions, for the whole program; 0 where they do not show their shape."""
    bytes_read: int
    bytes_written: int
    """Global memory, for the whole program, predicates taken as true."""
    full_waits: int
    """How often it waits until no matrix product is under way."""
    spills: int
    """Loads and stores of spilled registers."""
    clocks: Clocks | None


class Inspection(NamedTuple):
    """One binary."""

    architecture: str
    registers: int
    spill_bytes: int
    """Stored by one thread in all."""
    shared_bytes: int
    programs: int
    """How many programs fit a multiprocessor at once."""
    matrix: dict[str, int]
    """Matrix instructions by kind: HGMMA, HMMA, tcgen05, MFMA."""
    serialized: list[str]
    """ptxas's complaints that it had to put matrix products one after the other."""
    hot: Loop
    """The loop of most matrix work per instruction; without such work, of most memory traffic; without a loop, all."""
    loops: list[Loop]
    """All innermost loops with matrix instructions."""


class Instruction(NamedTuple):
    """Name and operands, and where it may jump to."""

    position: int
    name: str
    operands: str
    target: int | None = None


def innermost_loops(code: Sequence[Instruction], wanted: Callable[[Instruction], bool]) -> list[Sequence[Instruction]]:
    """Return the bodies of the loops that hold a wanted instruction and no smaller loop that does."""
    ends: dict[int, int] = {}
    for index, instruction in enumerate(code):
        if instruction.target is not None and instruction.target < instruction.position:
            ends[instruction.target] = index
    start_of = {instruction.position: index for index, instruction in enumerate(code)}
    spans = [(start_of[target], end) for target, end in ends.items() if target in start_of]
    spans = [(a, b) for a, b in spans if any(map(wanted, code[a : b + 1]))]
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [code[a : b + 1] for a, b in sorted(inner)]


def hottest(matrix_loops: Sequence[Loop], memory_loops: Sequence[Loop], whole: Loop) -> Loop:
    """Choose the hot loop: see `Inspection.hot`."""
    if matrix_loops:
        return max(matrix_loops, key=lambda loop: (loop.flops or loop.matrix) / loop.instructions)
    if memory_loops and not whole.matrix:
        return max(memory_loops, key=lambda loop: (loop.bytes_read + loop.bytes_written) / loop.instructions)
    return whole


def programs_that_fit(architecture: str, registers: int, num_warps: int, shared_bytes: int) -> int:
    """Count the programs that a multiprocessor holds at once. Registers are given out by 8 a thread, and 1 KB of shared
    memory goes with each program (NVIDIA).
    """
    chip = CHIPS[architecture]
    is_amd = architecture == "gfx942"
    by_threads = chip.registers // (-(-max(registers, 1) // 8) * 8 * num_warps * (64 if is_amd else 32))
    by_shared = chip.shared // max(1, shared_bytes + (0 if is_amd else 1024))
    return min(by_threads, by_shared, chip.warps // num_warps)
