"""Which calls the static report compiles, and what the gate asks of their kernels."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linattn.bench.codegen.limits import Limits
from linattn.kernels.common.gpu.architecture import as_architecture
from linattn.kernels.common.gpu.launch import Launch, recording
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Plan
from linattn.kernels.softmax import contract as softmax_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

B, H, T = 4, 16, 4096
"""Every call's batch, heads and length; a decoding step has one query."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# Scale, coefficients and normalize; scale, map and normalize.
OPTIONS = {"quadratic": (1.0, 1.0, 2.0, 1.0, True), "feature_map": (1.0, "elu+1", True)}


class Case(NamedTuple):
    """One call of an op's Triton backend. M = D; keys and values have as many heads as the queries."""

    op: str
    form: str
    direction: str
    dtype: str
    D: int
    causal: bool


FORWARD, BACKWARD, BOTH = ("forward",), ("backward",), ("forward", "backward")
YES, NO = (True,), (False,)
SIZES = (16, 32, 64, 128, 256)

# What the command compiles:  op, form, passes, dtypes, head sizes, causal
CASES = [
    ("softmax", "direct", BOTH, ("bf16",), SIZES, YES),
    ("softmax", "direct", BOTH, ("bf16",), (64, 128), NO),
    ("softmax", "direct", BOTH, ("fp32",), (64, 128), YES),
    ("quadratic", "direct", BOTH, ("bf16",), SIZES, YES),
    ("quadratic", "direct", BOTH, ("bf16",), (64, 128), NO),
    ("quadratic", "direct", BOTH, ("fp32",), (64, 128), YES),
    ("quadratic", "chunked", BOTH, ("bf16",), (16, 32, 64, 128), YES),
    ("quadratic", "chunked", BOTH, ("fp32",), (64,), YES),
    ("quadratic", "recurrent", FORWARD, ("bf16",), (64, 128), YES),
    ("feature_map", "chunked", BOTH, ("bf16",), SIZES, YES),
    ("feature_map", "chunked", BOTH, ("bf16",), (64, 128), NO),
    ("feature_map", "chunked", BOTH, ("fp32",), (64, 128), YES),
    ("feature_map", "recurrent", FORWARD, ("bf16",), (64, 128), YES),
]

AMPERE, HOPPER = ("sm_80",), ("sm_90",)
# What the gate holds to LIMITS, and where: the one table of required kernels.
REQUIRED = [
    (HOPPER, "softmax", "direct", BOTH, ("bf16",), (64, 128), YES),
    (AMPERE, "softmax", "direct", BOTH, ("bf16",), (64,), YES),
    (HOPPER, "quadratic", "direct", BOTH, ("bf16",), (32, 64, 128), YES),
    (AMPERE, "quadratic", "direct", BOTH, ("bf16",), (64, 128), YES),
    (HOPPER, "quadratic", "direct", FORWARD, ("fp32",), (64,), YES),
    (HOPPER, "quadratic", "chunked", BOTH, ("bf16",), (64, 128), YES),
    (HOPPER, "quadratic", "recurrent", FORWARD, ("bf16",), (128,), YES),
    (HOPPER, "feature_map", "chunked", BOTH, ("bf16",), (64, 128), YES),
    (AMPERE, "feature_map", "chunked", BOTH, ("bf16",), (64,), YES),
    (HOPPER, "feature_map", "recurrent", FORWARD, ("bf16",), (128,), YES),
]


class KernelLimits(NamedTuple):
    """Limits of a kernel at all head sizes; see `limits.Limits`."""

    issue: dict[int, float] | None
    full_waits: int = 0
    spill_bytes: int = 128


# Some 25 % above what Triton 3.6 and 3.9 make of the kernels on sm_90.
LIMITS = {
    ("softmax", "forward_kernel"): KernelLimits({64: 1.15, 128: 0.65}, full_waits=1),
    ("softmax", "dq_kernel"): KernelLimits({64: 0.7, 128: 0.55}, full_waits=2),
    ("softmax", "dkv_kernel"): KernelLimits({64: 0.85, 128: 0.7}, full_waits=2),
    ("quadratic", "forward_kernel"): KernelLimits({32: 1.6, 64: 0.85, 128: 0.5}, full_waits=1),
    ("quadratic", "dq_kernel"): KernelLimits({32: 1.1, 64: 0.6, 128: 0.5}, full_waits=2),
    ("quadratic", "dkv_kernel"): KernelLimits({32: 1.9, 64: 1.0, 128: 0.8}, full_waits=2),
    ("quadratic", "chunk_products_kernel"): KernelLimits({64: 0.65, 128: 0.5}),
    ("quadratic", "chunk_moments_kernel"): KernelLimits({64: 1.85, 128: 1.3}, full_waits=1),
    ("quadratic", "state_scan_kernel"): KernelLimits(None),
    ("quadratic", "chunk_output_kernel"): KernelLimits({64: 0.45, 128: 0.5}),
    ("quadratic", "bwd_preprocess_kernel"): KernelLimits(None),
    ("quadratic", "chunk_dq_kernel"): KernelLimits({64: 0.75, 128: 0.6}, full_waits=2),
    ("quadratic", "chunk_dkv_kernel"): KernelLimits({64: 0.8, 128: 0.6}),
    ("quadratic", "cancelled_dkv_kernel"): KernelLimits(None),  # ends at once, but for queries whose sums cancel
    ("quadratic", "decode_state_kernel"): KernelLimits(None),
    ("quadratic", "decode_output_kernel"): KernelLimits(None),
    # Bound by memory: the matrix unit waits for it, not for instructions.
    ("feature_map", "chunk_state_kernel"): KernelLimits({64: 11.0, 128: 12.5}, full_waits=1),
    ("feature_map", "chunk_output_kernel"): KernelLimits({64: 1.3, 128: 1.2}, full_waits=1),
    ("feature_map", "chunk_backward_kernel"): KernelLimits({64: 0.8, 128: 0.5}, full_waits=2, spill_bytes=256),
    ("feature_map", "recurrent_kernel"): KernelLimits(None),
}
FP32_WAITS = 6
"""A product of fp32 matrices is three of TF32, and none of them overlaps with the next."""


def limits(case: Case, kernel: str) -> Limits | None:
    """Return the limits of a kernel of a case; None if the table has none."""
    family = LIMITS.get((case.op, kernel))
    if family is None or (family.issue is not None and case.D not in family.issue):
        return None
    issue = None if family.issue is None else family.issue[case.D]
    full_waits = family.full_waits * (FP32_WAITS if case.dtype == "fp32" else 1)
    return Limits(issue, full_waits, family.spill_bytes)


def cases(table: Iterable[tuple[Any, ...]]) -> Iterator[Case]:
    """Yield the calls of a table."""
    for op, form, *lists in table:
        for direction, dtype, D, causal in itertools.product(*lists):
            yield Case(op, form, direction, dtype, D, causal)


def required() -> set[tuple[Case, str]]:
    """Return the calls of REQUIRED and the architectures on which they are required."""
    return {(case, name) for names, *line in REQUIRED for name in names for case in cases([tuple(line)])}


def launches(case: Case, architecture: str) -> list[Launch]:
    """Return what a call would launch there, found by running it on tensors that have no memory."""
    module = importlib.import_module(f"linattn.kernels.{case.op}.ops").implementation("triton")
    call = _softmax if case.op == "softmax" else _with_state
    with as_architecture(architecture):
        with recording() as forward:
            backward_of_it = call(module, case)
        if case.direction == "forward":
            return forward
        with recording() as backward:
            backward_of_it()
        return backward


def _softmax(module: Any, case: Case) -> Callable[[], Any]:
    q, k, v, dout = (_heads(case, T) for _ in range(4))
    options = (None, None, case.causal, 0, case.D**-0.5)
    out, lse = module.forward(softmax_contract.ForwardInputs(q, k, v, *options))
    return lambda: module.backward(softmax_contract.BackwardInputs(dout, q, k, v, out, lse, *options))


def _with_state(module: Any, case: Case) -> Callable[[], Any]:
    contract = importlib.import_module(f"linattn.kernels.{case.op}.contract")
    options, plan = contract.Options(case.causal, 0, *OPTIONS[case.op]), Plan(case.form, "triton")
    is_step = case.form == "recurrent"
    q, k, v, dout = (_heads(case, 1 if is_step else T) for _ in range(4))
    inputs = (None, None, _state(contract, case) if is_step else [])
    saves = case.direction == "backward"
    out, row_sums, _, saved = module.forward(ForwardInputs(q, k, v, *inputs, options, is_step, saves, plan))
    needs_grad = [True, True, True, False]
    return lambda: module.backward(
        BackwardInputs(dout, [], q, k, v, out, row_sums, saved, *inputs, options, needs_grad, plan)
    )


def _heads(case: Case, length: int) -> Tensor:
    """As models hold them: [B, T, H, D] in memory."""
    return torch.empty(B, length, H, case.D, dtype=DTYPES[case.dtype], device="meta").transpose(1, 2)


def _state(contract: Any, case: Case) -> list[Tensor]:
    n, *sums = contract.state_shapes(B, H, case.D, case.D)
    return [torch.empty(n, dtype=torch.int64, device="meta")] + [torch.empty(x, device="meta") for x in sums]
