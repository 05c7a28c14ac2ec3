"""From which length on the chunked quadratic form is the faster one, as measured: the table that dispatch reads.

Two are shipped beside this file: chunked_from.json, and for GPUs that nobody has measured chunked_from_predicted.json,
which `linattn calibrate --predict` writes. `linattn calibrate` measures the machine it runs on and writes to
`user_file()`, whose entries win. A table maps "backend/machine/dtype" ("native/avx512/fp32", "triton/sm_90/bf16",
"reference/cpu/fp32") to "causal" and "non-causal", and these the head size D to the length N*, for M = D and 4 heads.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import torch

from linattn import cost
from linattn._util.files import atomic_file
from linattn.errors import DataError
from linattn.kernels.common.op import backend as backends

Lengths = dict[int, float]
Table = dict[str, dict[str, Lengths]]
Factors = dict[str, dict[str, list[tuple[int, float]]]]

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
SHIPPED = Path(__file__).parent / "tables" / "chunked_from.json"
PREDICTED = Path(__file__).parent / "tables" / "chunked_from_predicted.json"


def user_file() -> Path:
    """Where `linattn calibrate` writes: $LINATTN_CALIBRATION, or chunked_from.json in the user's cache."""
    named = os.environ.get("LINATTN_CALIBRATION")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "linattn" / "chunked_from.json"


def load(path: Path) -> Table:
    """Read a table.

    Raises:
        DataError: it cannot be read, or is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): {str(mask): {int(D): float(N) for D, N in lengths.items()} for mask, lengths in entry.items()}
            for key, entry in data.items()
        }
    except (OSError, ValueError, AttributeError) as problem:
        raise DataError(f"cannot read calibration table {path}: {problem}") from problem


def save(path: Path, table: Table) -> None:
    """Write a table, whole and by renaming."""
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as problem:
        raise DataError(f"cannot write calibration table {path}: {problem}") from problem


def _in_force() -> Table:
    table, own = load(SHIPPED), user_file()
    return {**table, **load(own)} if own.is_file() else table


def factors(table: Table) -> Factors:
    """For each size D of a table, in order: the length that stands there, divided by the one by flops."""
    return {
        key: {
            mask: [(D, lengths[D] / cost.crossover(D, is_causal=mask == "causal")) for D in sorted(lengths)]
            for mask, lengths in entry.items()
        }
        for key, entry in table.items()
    }


# Every call reads these: what can be computed beforehand is.
MEASURED = factors(_in_force())
PREDICTIONS = factors(load(PREDICTED))


def key_of(backend: str, device: str, dtype: torch.dtype) -> str:
    """Under which key a table files a backend on this machine."""
    return f"{backend}/{_machine(backend, device)}/{DTYPES[dtype]}"


def _machine(backend: str, device: str) -> str:
    if backend == "native":
        return backends.CAPABILITY
    if backend == "triton" and device == "cuda":
        from linattn.kernels.common.gpu.architecture import architecture

        return architecture(torch.device(device))
    return device


def chunked_from(key: str, D: int, M: int, *, is_causal: bool) -> float:
    """The length from which the chunked form pays.

    It is `cost.crossover`, where both forms take as many flops, times a factor: what was measured, or else predicted,
    divided by that count, interpolated in log D. Without either the factor is 1.
    """
    points = _entry(key).get("causal" if is_causal else "non-causal")
    return cost.crossover(D, M, is_causal=is_causal) * (_interpolated(points, D) if points else 1.0)


def source(key: str) -> str:
    """Say in words what `chunked_from` rests on."""
    machine = key.split("/")[1]
    if _filed(MEASURED, key):
        return f"as measured on {machine}"
    return f"predicted for {machine} from flops, not measured" if _entry(key) else "by flops, not measured here"


def _entry(key: str) -> dict[str, list[tuple[int, float]]]:
    return _filed(MEASURED, key) or _filed(PREDICTIONS, key)


def _filed(table: Factors, key: str) -> dict[str, list[tuple[int, float]]]:
    """The factors of a key, or of the same machine in fp32."""
    return table.get(key) or table.get(key.rsplit("/", 1)[0] + "/fp32") or {}


def _interpolated(points: list[tuple[int, float]], D: int) -> float:
    """Linear in log D between points, constant beyond them."""
    if points[0][0] >= D:
        return points[0][1]
    for (left, a), (right, b) in itertools.pairwise(points):
        if right >= D:
            share = math.log(D / left) / math.log(right / left)
            return a * math.exp(share * math.log(b / a))
    return points[-1][1]
