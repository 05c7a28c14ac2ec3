"""`linattn kernels`: compile every GPU kernel for several architectures and report what its machine code shows.

Needs Triton and no GPU. Nothing is run and nothing is timed: docs/gpu-kernels.md says how to read the report.
Exit status 1 if a kernel that the gate requires breaks its limits.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

import linattn
from linattn._util.progress import progress
from linattn._util.tables import text_table
from linattn.bench.codegen import cases
from linattn.bench.codegen.cases import CASES, Case, launches
from linattn.bench.codegen.limits import violations
from linattn.errors import ArgumentError, BackendError, unknown_name
from linattn.kernels.common.op.backend import INTERPRETED, TRITON_ABSENT

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from linattn.bench.codegen.machine_code import Inspection, Loop
    from linattn.kernels.common.gpu.launch import Launch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
OPERATIONS = ("softmax", "quadratic", "feature_map")
REACHED = 0.83
"""Published Triton attention kernels reach about this share of what the clocks of their machine code predict."""

KernelRecord = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `linattn kernels`."""
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, with commas (%(default)s)")
    parser.add_argument("--op", default=",".join(OPERATIONS), help="operations, with commas (%(default)s)")
    parser.add_argument("--required", action="store_true", help="only the kernels that the gate requires")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if a required kernel breaks its limits."""
    architectures = _names("architecture", args.arch, ARCHITECTURES)
    operations = _names("operation", args.op, OPERATIONS)
    if args.jobs < 1:
        raise ArgumentError(f"--jobs takes a number of processes, at least 1; given {args.jobs}")
    report = collect(architectures, operations, required_only=args.required, jobs=args.jobs)
    print(json.dumps(report, indent=1) if args.json else render(report))
    return 1 if broken(report) else 0


def collect(
    architectures: Iterable[str], operations: Iterable[str], *, required_only: bool = False, jobs: int = 1
) -> dict[str, Any]:
    """Compile the calls of the tables and return the whole report, ready for JSON."""
    if TRITON_ABSENT or INTERPRETED:
        raise BackendError(
            "the kernels cannot be compiled: " + (TRITON_ABSENT or "TRITON_INTERPRET=1 interprets them; unset it")
        )
    required = cases.required()
    every = dict.fromkeys([*cases.cases(CASES), *(case for case, _ in sorted(required))])
    work = [
        (case, architecture, (case, architecture) in required)
        for case in every
        if case.op in set(operations)
        for architecture in architectures
        if (case, architecture) in required or not required_only
    ]
    return {
        "versions": {
            "linattn": linattn.__version__,
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
        },
        "note": "compiled offline; nothing was run on a GPU",
        "call": {"B": cases.B, "H": cases.H, "T": cases.T},
        "rows": [row for rows in _inspect_all(work, jobs) for row in rows],
    }


def broken(report: dict[str, Any]) -> list[KernelRecord]:
    """Return the records of required kernels that break their limits."""
    return [row for row in report["rows"] if row["required"] and row["problems"]]


def inspect_case(case: Case, architecture: str, required: bool) -> list[KernelRecord]:
    """Return a record of each kernel that a call launches."""
    about: KernelRecord = {**case._asdict(), "architecture": architecture, "required": required}
    try:
        recorded = launches(case, architecture)
    except Exception as error:
        return [{**about, "kernel": "", "problems": [f"cannot be launched: {_shorten(error)}"]}]
    return [{**about, **_kernel(launch, case, architecture, required)} for launch in recorded]


def _kernel(launch: Launch, case: Case, architecture: str, required: bool) -> KernelRecord:
    name = launch.kernel.fn.__name__
    about = {"kernel": name, "configuration": _configuration(launch)}
    try:
        inspection = importlib.import_module("linattn.bench.codegen.inspection").inspect_launch(launch, architecture)
    except Exception as error:  # whatever a compiler may raise
        return {**about, "problems": [f"does not compile: {_shorten(error)}"]}
    problems = []
    if required:
        limits = cases.limits(case, name)
        problems = violations(inspection, limits) if limits else [f"no limits are known for {case.op} {name}"]
    return {**about, **_facts(inspection), "problems": problems}


def _configuration(launch: Launch) -> str:
    tiles = [f"{name[6:]}{value}" for name, value in launch.arguments.items() if name.startswith("BLOCK_")]
    return " ".join([*tiles, f"w{launch.num_warps}", f"s{launch.num_stages}"])


def _facts(inspection: Inspection) -> KernelRecord:
    hot, clocks = inspection.hot, inspection.hot.clocks
    moved = hot.bytes_read + hot.bytes_written
    return {
        "registers": inspection.registers,
        "spill_bytes": inspection.spill_bytes,
        "shared_bytes": inspection.shared_bytes,
        "programs": inspection.programs,
        "matrix": inspection.matrix,
        "serialized": inspection.serialized,
        "instructions_per_tile": hot.instructions,
        "matrix_per_tile": hot.matrix,
        "flops_per_tile": hot.flops,
        "bytes_per_tile": moved,
        "bytes_per_matrix_clock": round(moved / clocks.matrix, 1) if clocks and clocks.matrix else None,
        "full_waits": hot.full_waits,
        "spills_per_tile": hot.spills,
        "clocks": {unit: round(busy, 1) for unit, busy in clocks._asdict().items()} if clocks else None,
        "share": _share(hot),
    }


def _share(hot: Loop) -> list[float] | None:
    """Estimate the share of the matrix unit's peak: if nothing overlaps with it, and if everything does."""
    if hot.clocks is None or not hot.clocks.matrix:
        return None
    return [round(REACHED * hot.clocks.serial, 3), round(REACHED * hot.clocks.overlapped, 3)]


def _inspect_all(work: list[tuple[Case, str, bool]], jobs: int) -> Iterator[list[KernelRecord]]:
    with progress(len(work), "call") as bar:
        for rows in _inspect_each(work, jobs):
            bar.update()
            yield rows


def _inspect_each(work: list[tuple[Case, str, bool]], jobs: int) -> Iterator[list[KernelRecord]]:
    if jobs == 1:
        yield from map(_inspect_item, work)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_inspect_item, work)


def _inspect_item(item: tuple[Case, str, bool]) -> list[KernelRecord]:
    return inspect_case(*item)


# ---- for people ------------------------------------------------------------------------------------------------------
HEADER = (
    "op", "form", "pass", "kernel", "dtype", "D", "causal", "arch", "configuration", "regs", "spill", "smem KB", "fit",
    "matrix", "waits", "KB/tile", "MFLOP/tile", "B/clock", "share", "gate",
)  # fmt: skip


def render(report: dict[str, Any]) -> str:
    """Format the report: a line for each kernel, then what is wrong."""
    versions, rows = report["versions"], report["rows"]
    head = f"linattn {versions['linattn']}, Triton {versions['triton']}: {len(rows)} kernels {report['note']}."
    wrong = [f"{_title(row)}: {problem}" for row in rows for problem in row["problems"]]
    required, failed = [row for row in rows if row["required"]], broken(report)
    verdict = f"gate: {len(required) - len(failed)} of {len(required)} required kernels within their limits"
    return "\n".join([head, "", text_table(HEADER, [_cells(row) for row in rows]), "", *wrong, verdict])


def _cells(row: KernelRecord) -> list[object]:
    about = [row["op"], row["form"], row["direction"], row["kernel"], row["dtype"], row["D"]]
    about += ["yes" if row["causal"] else "no", row["architecture"], row.get("configuration", "")]
    verdict = "-" if not row["required"] else "broken" if row["problems"] else "ok"
    if "registers" not in row:
        return [*about, *[""] * 10, verdict]
    kinds = " ".join(f"{count} {kind}" for kind, count in row["matrix"].items()) or "none"
    serialized = " serialized" if row["serialized"] else ""
    share = row["share"]
    return [
        *about,
        str(row["registers"]),
        str(row["spill_bytes"]) + (" hot" if row["spills_per_tile"] else ""),
        f"{row['shared_bytes'] / 1024:.0f}",
        str(row["programs"]),
        kinds + serialized,
        str(row["full_waits"]),
        f"{row['bytes_per_tile'] / 1024:.1f}",
        f"{row['flops_per_tile'] / 1e6:.2f}",
        f"{row['bytes_per_matrix_clock']:.0f}" if share else "",
        f"{share[0]:.2f}-{share[1]:.2f}" if share else "",
        verdict,
    ]


def _title(row: KernelRecord) -> str:
    mask = "causal" if row["causal"] else "full"
    words = (row["op"], row["form"], row["direction"], row["kernel"], row["dtype"], f"D={row['D']}", mask)
    return " ".join([*filter(None, words), "on", row["architecture"]])


def _names(what: str, given: str, accepted: tuple[str, ...]) -> list[str]:
    names = given.split(",")
    for name in names:
        if name not in accepted:
            raise unknown_name(what, name, accepted)
    return names


def _shorten(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
