"""`linattn calibrate`: measure from which length on the chunked quadratic form pays on this machine.

dispatch then reads the answer (linattn/_dispatch/calibration.py). Only the two forms of one backend are compared,
forward, on 4 heads, at lengths a factor of sqrt(2) apart around the expected crossing, until the order is the same on
two lengths on each side. The table is written after every head size, so an interrupted run loses little. Where the
chunked form may keep its sums for the backward pass or make them again, both are timed too, forward and backward at the
crossing. `--predict` measures nothing: it writes the lengths at which both forms of the GPU kernels take as long, if
both reach the same share of the matrix unit's peak.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

import linattn
from linattn import cost
from linattn._dispatch import calibration
from linattn._util.environment import pick_device
from linattn.bench.measuring.cases import DTYPES, QUADRATIC_CHUNKED, QUADRATIC_DIRECT, Problem, prepare
from linattn.bench.measuring.crossing import BRACKET, Crossing, find_crossing
from linattn.bench.measuring.timing import side_by_side, summarise
from linattn.errors import BackendError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

HEAD_SIZES = (16, 32, 64, 128)
BUDGET_S = 0.6
LONGEST_CALL_S = 4.0
MASKS = {"non-causal": False, "causal": True}

Samples = dict[int, list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn calibrate`."""
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    parser.add_argument("--backend", default="auto", help="native, triton or reference (default: what auto chooses)")
    parser.add_argument(
        "--dtype", action="append", choices=list(DTYPES), help="may be repeated (default: fp32 and bf16)"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=HEAD_SIZES, metavar="D", help="head sizes (%(default)s)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds a length (%(default)s)")
    parser.add_argument("--predict", action="store_true", help="write the GPU kernels' table from their flops alone")
    parser.add_argument("--out", type=Path, help="file to add to (default: the one that dispatch reads)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a line a head size, and write the table."""
    if args.predict:
        calibration.save(args.out or calibration.PREDICTED, predict_lengths())
        return 0
    device = pick_device(args.device)
    path = args.out or calibration.user_file()
    table = calibration.load(path) if path.is_file() else {}
    for dtype in args.dtype or ("fp32", "bf16"):
        for D in args.sizes:
            for mask, is_causal in MASKS.items():
                problem = Problem(round(cost.crossover(D, is_causal=is_causal)), D, D, dtype=dtype, is_causal=is_causal)
                backend = backend_of(problem, args.backend, device)
                crossing = crossing_near(problem, backend, device, args.budget)
                key = calibration.key_of(backend, device.type, DTYPES[dtype])
                found = "no crossing measured" if crossing is None else str(crossing)
                print(f"{key} D={D} {mask}: {found}, {problem.N} by flops", flush=True)
                if crossing is not None and crossing.value is not None:
                    table.setdefault(key, {}).setdefault(mask, {})[D] = round(crossing.value, 1)
                    if backend == "triton":
                        print(f"{key} D={D} {mask}: {_kept_or_not(problem, crossing.value, device, args.budget)}")
        calibration.save(path, table)
    print(f"written: {path}", file=sys.stderr)
    return 0


def predict_lengths() -> calibration.Table:
    """Return lengths at which the direct and the chunked Triton kernels take as many flops as they do them, for every
    row of their table. Per token, with F = D (D + 16) / 2 features: direct 2 N (D + M), half when causal; chunked 4 F M
    + 4 D M for sums over values, twice 4 D^2 for those of the row sum, in TF32 at half the rate, and causal c (D + M)
    for the own chunk.
    """
    from linattn.kernels.quadratic.gpu import config, state_layout

    table: calibration.Table = {}
    for machine, dtype, D in itertools.product(("sm_80", "sm_90", "sm_100", "gfx942", "consumer"), DTYPES, HEAD_SIZES):
        if DTYPES[dtype] not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        chunk = config.configuration(machine, DTYPES[dtype], D).chunk
        squares = 4 if dtype == "fp32" else 8
        balance = (4 * state_layout.feature_count(D) * D + (4 + squares) * D * D) / (2 * D)
        entry = table.setdefault(f"triton/{machine}/{dtype}", {})
        entry.setdefault("causal", {})[D] = balance + chunk
        entry.setdefault("non-causal", {})[D] = balance / 2
    return table


def _kept_or_not(problem: Problem, length: float, device: torch.device, budget_s: float) -> str:
    """Say how forward and backward compare with the sums kept and with the sums made again, in words."""
    longer = replace(problem, N=max(16, round(length / 16) * 16), direction="training")
    tensors, found = longer.inputs(device), []
    for setting in ("always", "never"):
        with mock.patch.dict(os.environ, LINATTN_KEEP_SUMS=setting):
            call = prepare(replace(QUADRATIC_CHUNKED, backend="triton"), longer, tensors)
            samples, _ = side_by_side({setting: call}, device=device, budget_s=budget_s)
            found.append(summarise(samples[setting]).median)
    return f"forward and backward of {longer.N} tokens: {found[0]:.3g} ms with sums kept, {found[1]:.3g} ms without"


def backend_of(problem: Problem, asked: str, device: torch.device) -> str:
    """Return the backend that will run, by name. Raises BackendError if the one asked for cannot."""
    q, k, v = replace(problem, N=16).inputs(device)
    return linattn.explain(q, k, v, kernel="quadratic", form="chunked", backend=asked).backend


def crossing_near(problem: Problem, backend: str, device: torch.device, budget_s: float) -> Crossing | None:
    """Find N* of the chunked against the direct form, searched from `problem.N` outwards."""
    chunked, direct = Samples(), Samples()

    def faster(N: int) -> bool:
        if N not in chunked:
            _measure(replace(problem, N=N), backend, device, budget_s, chunked, direct)
        return summarise(chunked[N]).median < summarise(direct[N]).median

    sizes = _ladder(problem.N)
    start = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / problem.N)))
    try:
        faster(sizes[start])
        direct_s = summarise(direct[sizes[start]]).median / 1e3
        _walk(sizes[start::-1], lambda N: not faster(N))
        _walk([N for N in sizes[start:] if direct_s * (N / sizes[start]) ** 2 < LONGEST_CALL_S], faster)
    except BackendError as refusal:
        print(f"{problem}: {refusal}", file=sys.stderr)
        return None
    return find_crossing(chunked, direct)


def _walk(sizes: Sequence[int], holds: Callable[[int], bool]) -> None:
    """Go along `sizes` until a condition has held on enough of them in a row."""
    in_a_row = 0
    for N in sizes:
        in_a_row = in_a_row + 1 if holds(N) else 0
        if in_a_row == BRACKET:
            return


def _ladder(near: int) -> list[int]:
    """Return multiples of 16 about a factor of sqrt(2) apart, from near / 16 to 16 near."""
    return sorted({max(32, round(near * 2 ** (i / 2) / 16) * 16) for i in range(-8, 9)})


def _measure(
    problem: Problem, backend: str, device: torch.device, budget_s: float, chunked: Samples, direct: Samples
) -> None:
    tensors = problem.inputs(device)
    calls = {
        str(method.form): prepare(replace(method, backend=backend), problem, tensors)
        for method in (QUADRATIC_CHUNKED, QUADRATIC_DIRECT)
    }
    samples, _ = side_by_side(calls, device=device, budget_s=budget_s)
    chunked[problem.N], direct[problem.N] = samples["chunked"], samples["direct"]
