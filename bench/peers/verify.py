"""Prove what peers compute: each is held against the truth of its operation in float64 before it is compared.

    linattn peers             the proofs, then every peer that passed beside ours and SDPA
    linattn peers --proofs    the proofs only

A peer that is not installed is listed as missing, one that does not run here with its reason. None is left out.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from linattn._util.environment import pick_device
from linattn._util.progress import progress
from linattn._util.tables import text_table
from linattn.bench.crossover import tables
from linattn.bench.crossover.sweep import add_run_arguments, set_threads
from linattn.bench.measuring.accuracy import truth_of
from linattn.bench.measuring.cases import (
    ELU_CHUNKED,
    QUADRATIC_CHUNKED,
    QUADRATIC_DIRECT,
    SDPA,
    Method,
    Problem,
    prepare,
)
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.measure import measure
from linattn.bench.measuring.memory import MemoryProbe
from linattn.bench.measuring.results import Measurement, Results
from linattn.bench.peers.implementations import PEERS
from linattn.errors import MissingExtraError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from linattn.cost import Form

State = Literal["proved", "differs", "missing", "cannot run here"]

COMPUTES = {
    "softmax": "exp(q.k / sqrt(D)), softmax itself",
    "quadratic": "(1 + q.k)^2, exactly ours",
    "power": "(q.k)^2: without the constant and the linear term of ours",
    "elu+1": "phi(q).phi(k) with phi = elu + 1, as ours",
    "plain": "q.k: no feature map, not divided by its sum",
}
"""Each operation, beside ours."""
ACCEPTED = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest relative error of outputs and gradients that passes as rounding: peers in bf16 round in many places."""
LINEAR_PEERS = ("features-cumsum", "elu-cumsum", "fla-linear", "fla-plain", "retention", "lightning")
HEADINGS = ("peer", "from", "computes", "state", "error", "gradient", "detail")


@dataclass(frozen=True)
class Proof:
    """The outcome for one peer: errors are relative, against float64; None where it was not run."""

    peer: str
    package: str
    op: str
    state: State
    error: float | None = None
    gradient_error: float | None = None
    detail: str = ""


def method_of(peer: str) -> Method:
    """Return the peer as a method that can be measured."""
    form: Form = "chunked" if peer in LINEAR_PEERS else "direct"
    return SDPA if peer == "sdpa" else Method(peer, PEERS[peer].op, form, peer)


def prove(peer: str, device: torch.device, dtype: str) -> Proof:
    """Run a peer on 192 tokens, with every mask it has, forward and, if it can, backward, against float64."""
    entry, errors, gradient_errors, detail = PEERS[peer], [], [], ""
    for is_causal in (True,) if entry.causal_only else (False, True):
        problem = Problem(192, 32, 32, H=2, dtype=dtype, is_causal=is_causal)
        try:
            errors.append(_errors(method_of(peer), problem, device)[0])
        except (ImportError, MissingExtraError) as absence:
            return Proof(peer, entry.package, entry.op, "missing", detail=_missing(entry.package, absence))
        except Exception as error:  # whatever a peer raises, it must not take the others down
            return Proof(peer, entry.package, entry.op, "cannot run here", detail=_first_line(error))
        try:
            gradient_errors.append(_errors(method_of(peer), replace(problem, direction="training"), device)[1])
        except Exception as error:
            detail = f"forward only: {_first_line(error)}"
            # Else what failed to compile runs uncompiled from now on, forward too: FlexAttention on CPU at a tenth.
            torch.compiler.reset()
    found = [*errors, *gradient_errors]
    if all(error is not None and error <= ACCEPTED[dtype] for error in found):
        state: State = "proved"
    else:
        state, detail = "differs", f"more than {ACCEPTED[dtype]:.0e} off: not compared"
    return Proof(peer, entry.package, entry.op, state, _worst(errors), _worst(gradient_errors), detail)


def table(proofs: Iterable[Proof]) -> list[tuple[str, ...]]:
    """Format one line a peer, under `HEADINGS`."""
    return [
        (p.peer, p.package, COMPUTES[p.op], p.state, _number(p.error), _number(p.gradient_error), p.detail)
        for p in proofs
    ]


def proofs_in(results: Results) -> list[Proof]:
    """Return the proofs that a result file of this kind carries."""
    found = results.settings.get("proofs")
    return [Proof(**proof) for proof in found] if isinstance(found, list) else []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `linattn peers`."""
    parser.add_argument("--proofs", action="store_true", help="only prove what each computes, measure nothing")
    parser.add_argument("--length", type=int, default=4096, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--head-size", type=int, default=64, metavar="D", help="(%(default)s)")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="heads, B = 1 (%(default)s)")
    parser.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of timing (%(default)s)")
    add_run_arguments(parser, "runs/peers")


def run(args: argparse.Namespace) -> int:
    """Prove, print, and measure what passed beside ours."""
    device = pick_device(args.device)
    set_threads(args.threads)
    # Fused softmax kernels on GPUs take no fp32.
    dtype = "bf16" if device.type == "cuda" else "fp32"
    proofs = []
    with progress(len(PEERS), "problem") as bar:
        for peer in PEERS:
            bar.set_postfix_str(peer)
            proofs.append(prove(peer, device, dtype))
            bar.update()
    print(text_table(HEADINGS, table(proofs)))
    if args.proofs:
        return 0
    problem = Problem(args.length, args.head_size, args.head_size, H=args.heads, dtype=dtype, is_causal=True)
    settings: dict[str, object] = {"plan": "default", "proofs": [asdict(proof) for proof in proofs]}
    results = Results("peers", describe(device), settings, compare(problem, proofs, device, args.budget))
    results.save(args.out / "results.json")
    print(f"\n{problem}\n{tables.table(results.measurements)}\n\nwritten: {args.out / 'results.json'}", flush=True)
    return 0


def compare(problem: Problem, proofs: Sequence[Proof], device: torch.device, budget_s: float) -> list[Measurement]:
    """Measure every proved peer and ours on one problem, side by side; a peer that fails at this size says why."""
    ours = (QUADRATIC_DIRECT, QUADRATIC_CHUNKED, ELU_CHUNKED)
    peers = [method_of(proof.peer) for proof in proofs if proof.state == "proved"]
    failures = {method: _failure(method, problem, device) for method in peers}
    runs = [method for method, failure in failures.items() if failure is None]
    failed = [
        Measurement(method, problem, skipped=failure) for method, failure in failures.items() if failure is not None
    ]
    with MemoryProbe(device) as memory:
        return measure(problem, [*runs, *ours], device=device, budget_s=budget_s, memory=memory) + failed


def _failure(method: Method, problem: Problem, device: torch.device) -> str | None:
    """Call a peer once; say why it fails, None where it runs."""
    try:
        prepare(method, problem, problem.inputs(device))()
    except Exception as error:  # out of memory, a size that the peer has no kernel for
        print(f"{method.name}: {_first_line(error)}", file=sys.stderr)
        return _first_line(error)
    return None


def _errors(method: Method, problem: Problem, device: torch.device) -> tuple[float, float | None]:
    """Compute the error of the output and, in training, of the gradients."""
    tensors = problem.inputs(device)
    upstream = problem.inputs(device, seed=1)[2] if problem.direction == "training" else None
    results = prepare(method, problem, tensors, upstream)()
    truth = truth_of(method, problem, tensors, upstream)
    return truth.error(results), truth.gradient_error(results)


def _worst(errors: Sequence[float | None]) -> float | None:
    """Return the largest; NaN counts as the largest of all."""
    found = [error for error in errors if error is not None]
    return max(found, key=lambda error: math.inf if math.isnan(error) else error, default=None)


def _missing(package: str, problem: ImportError | MissingExtraError) -> str:
    if package != "torch" and importlib.util.find_spec(str(getattr(problem, "name", "") or "-").split(".")[0]) is None:
        return f"pip install {package}"
    return _first_line(problem)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
