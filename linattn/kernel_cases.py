"""Which calls the static report compiles, and what the gate asks of their kernels."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linattn.kernels.common.gpu.architecture import as_architecture
from linattn.kernels.common.gpu.gate import Limits
from linattn.kernels.common.gpu.launch import Launch, recording
from linattn.kernels.common.registration import implementation
from linattn.kernels.common.stateful import Plan

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
YES, NO, EITHER = (True,), (False,), (True, False)
SIZES = (16, 32, 64, 128, 256)

# What the command compiles:  op, form, passes, dtypes, head sizes, causal
CASES = [
    ("softmax", "direct", BOTH, ("bf16", "fp32"), SIZES, EITHER),
    ("quadratic", "direct", BOTH, ("bf16", "fp32"), SIZES, EITHER),
    ("quadratic", "chunked", BOTH, ("bf16", "fp32"), (16, 32, 64, 128), YES),
    ("quadratic", "recurrent", FORWARD, ("bf16", "fp32"), (64, 128), YES),
    ("feature_map", "chunked", BOTH, ("bf16", "fp32"), SIZES, EITHER),
    ("feature_map", "recurrent", FORWARD, ("bf16", "fp32"), (64, 128), YES),
]

# What the gate holds to LIMITS on sm_80 and sm_90.
REQUIRED = [
    ("softmax", "direct", BOTH, ("bf16",), (64, 128), YES),
    ("quadratic", "direct", BOTH, ("bf16",), (32, 64, 128), YES),
    ("quadratic", "direct", BOTH, ("fp32",), (64,), YES),
    ("feature_map", "chunked", BOTH, ("bf16",), (64, 128), YES),
    ("feature_map", "recurrent", FORWARD, ("bf16",), (128,), YES),
]

LIMITS: dict[tuple[str, str], Limits] = {}


def cases(table: list[tuple]) -> Iterator[Case]:
    """The calls of a table."""
    for op, form, *lists in table:
        for direction, dtype, D, causal in itertools.product(*lists):
            yield Case(op, form, direction, dtype, D, causal)


def launches(case: Case, architecture: str) -> list[Launch]:
    """What a call would launch there, found by running its launchers on tensors that have no memory."""
    module = implementation(importlib.import_module(f"linattn.kernels.{case.op}.ops").BACKENDS, "triton")
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
    out, lse = module.forward(q, k, v, *options)
    return lambda: module.backward(dout, q, k, v, out, lse, *options)


def _with_state(module: Any, case: Case) -> Callable[[], Any]:
    contract = importlib.import_module(f"linattn.kernels.{case.op}.contract")
    options, plan = contract.Options(case.causal, 0, *OPTIONS[case.op]), Plan(case.form, "triton")
    is_step = case.form == "recurrent"
    q, k, v, dout = (_heads(case, 1 if is_step else T) for _ in range(4))
    inputs = (None, None, _state(contract, case) if is_step else [])
    saves = case.direction == "backward"
    out, row_sums, _, saved = module.forward(q, k, v, *inputs, options, is_step, saves, plan)
    wanted = [True, True, True, False]
    return lambda: module.backward(dout, [], q, k, v, out, row_sums, saved, *inputs, options, wanted, plan)


def _heads(case: Case, length: int) -> Tensor:
    """As models hold them: [B, T, H, D] in memory."""
    return torch.empty(B, length, H, case.D, dtype=DTYPES[case.dtype], device="meta").transpose(1, 2)


def _state(contract: Any, case: Case) -> list[Tensor]:
    n, *sums = contract.state_shapes(B, H, case.D, case.D)
    return [torch.empty(n, dtype=torch.int64, device="meta")] + [torch.empty(x, device="meta") for x in sums]
