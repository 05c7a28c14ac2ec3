"""Which backend and which form a call runs on, and why."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from linattn._dispatch import calibration
from linattn.errors import BackendError, unknown_name
from linattn.kernels.common.op.backend import Backend, BackendQuery, anything
from linattn.kernels.common.op.stateful import Plan
from linattn.kernels.feature_map import ops as feature_map_ops
from linattn.kernels.quadratic import ops as quadratic_ops
from linattn.kernels.recurrent import ops as recurrent_ops
from linattn.kernels.softmax import ops as softmax_ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from linattn import cost
    from linattn._dispatch.checks import Form, Inputs

# In the order in which "auto" tries them.
BACKENDS: dict[str, dict[str, Backend]] = {
    "softmax": {
        "torch": Backend(anything, "torch.nn.functional.scaled_dot_product_attention"),
        **softmax_ops.BACKENDS,
    },
    "quadratic": quadratic_ops.BACKENDS,
    "feature_map": feature_map_ops.BACKENDS,
    "recurrent": recurrent_ops.BACKENDS,
}


class Choice(NamedTuple):
    """What was decided about one call."""

    inputs: Inputs
    backend: str
    form: cost.Form
    with_state: bool


class _Chosen(threading.local):
    """A thread-local and not a ContextVar: that would break fullgraph compilation.

    An attribute of the instance and not of the class, where compiled code would not notice that it changes.
    """

    def __init__(self) -> None:
        self.backend = "auto"
        self.device = ""
        self.choice: Choice | None = None
        self.notes = False


_chosen = _Chosen()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every attention and recurrence of this thread on one backend, unless a call names its own.

    A call that this backend cannot run raises `BackendError`; it never falls back.

    Example:
        >>> import torch, linattn
        >>> q = k = v = torch.randn(1, 2, 8, 4)
        >>> with linattn.use_backend("reference"):
        ...     out = linattn.softmax_attention(q, k, v)
    """
    known = {"auto"}.union(*BACKENDS.values())
    if backend not in known:
        raise unknown_name("backend", backend, known, BackendError)
    before, _chosen.backend = _chosen.backend, backend
    try:
        yield
    finally:
        _chosen.backend = before


def named_backend(backend: str) -> str:
    """The backend that a call names, or else the one of `use_backend` around it; "auto" if there is neither."""
    return _chosen.backend if backend == "auto" else backend


@contextmanager
def noting(device: str) -> Iterator[Callable[[], Choice]]:
    """Remember what is decided about the calls inside, as if their tensors were on `device`; yields a function that
    returns the last decision.
    """
    _chosen.notes, _chosen.device = True, device
    try:
        yield lambda: cast("Choice", _chosen.choice)
    finally:
        _chosen.notes, _chosen.device, _chosen.choice = False, "", None


def backends(op: str) -> dict[str, str]:
    """The backends of an op ("softmax", "quadratic", "feature_map", "recurrent"), and whether each can run here."""
    if op not in BACKENDS:
        raise unknown_name("operation", op, BACKENDS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = {}
    for name, backend in BACKENDS[op].items():
        query = BackendQuery("cpu" if name == "native" else device, torch.float32, 64, 64, "direct", named=True)
        states[name] = backend.refusal(query) or "available"
    return states


def refusals(op: str, inputs: Inputs, form: Form, with_state: bool) -> dict[str, str]:
    """Why a backend of `op` cannot run these inputs, for those that cannot."""
    found = {}
    for name in BACKENDS[op]:
        _, found[name] = _suited(op, name, form, inputs, with_state, named=True)
    return {name: reason for name, reason in found.items() if reason}


def _refusal(op: str, backend: str, inputs: Inputs, form: cost.Form, with_state: bool, named: bool) -> str:
    if backend == "torch":
        return _beyond_torch(inputs)
    device = _chosen.device or inputs.q.device.type
    D, M, T = inputs.q.shape[3], inputs.v.shape[3], inputs.q.shape[2]
    query = BackendQuery(device, inputs.q.dtype, D, M, form, named, T, with_state)
    return BACKENDS[op][backend].refusal(query)


def _beyond_torch(inputs: Inputs) -> str:
    reasons = []
    if inputs.key_mask is not None:
        reasons.append("key_mask: a row without keys must give 0, not NaN")
    if inputs.cu_seqlens is not None:
        reasons.append("cu_seqlens")
    if inputs.q_offset != 0:
        reasons.append("q_offset != 0")
    if inputs.q.shape[3] != inputs.v.shape[3]:
        reasons.append("D != M, which takes memory N x N there")
    if any(x.stride(3) != 1 for x in inputs[:3]):
        reasons.append("a last stride other than 1, which takes memory N x N there")
    return ", ".join(reasons)


def plan(op: str, inputs: Inputs, form: Form, backend: str, with_state: bool) -> Plan:
    """How an op is to be computed: on the backend that the call or `use_backend` names, or else on the first that can;
    the reference always can.
    """
    asked = named_backend(backend)
    if asked != "auto" and asked not in BACKENDS[op]:
        raise unknown_name(f"backend of {op} attention", asked, ("auto", *BACKENDS[op]), BackendError)
    chosen = None
    for name in BACKENDS[op] if asked == "auto" else (asked,):
        suited, refused = _suited(op, name, form, inputs, with_state, named=asked != "auto")
        if not refused:
            chosen = Plan(suited, name)
            break
        if asked != "auto":
            raise BackendError(f"backend {name!r} cannot run this {op} attention: {refused}; backend='auto' can")
    assert chosen is not None
    if _chosen.notes:
        _chosen.choice = Choice(inputs, chosen.backend, cast("cost.Form", chosen.form), with_state)
    return chosen


def softmax_backend(backend: str, inputs: Inputs) -> str:
    """What computes a softmax call; it has no other form than the direct one."""
    return plan("softmax", inputs, "direct", backend, with_state=False).backend


def _suited(op: str, backend: str, form: Form, inputs: Inputs, with_state: bool, named: bool) -> tuple[cost.Form, str]:
    """The form in which a backend would compute a call, and why it cannot, or "".

    "auto" is direct below the length where the linear form begins to pay, chunked from there on, if the backend has it.
    """
    if form != "auto":
        return form, _refusal(op, backend, inputs, form, with_state, named)
    if _chunked_pays(op, backend, inputs, with_state):
        refused = _refusal(op, backend, inputs, "chunked", with_state, named)
        if not refused:
            return "chunked", ""
    return "direct", _refusal(op, backend, inputs, "direct", with_state, named)


def _chunked_pays(op: str, backend: str, inputs: Inputs, with_state: bool) -> bool:
    T, Tk, sequences = inputs.q.shape[2], inputs.k.shape[2], inputs.sequences // inputs.q.shape[0]
    # `effective_length`, multiplied out so that symbolic sizes stay integers.
    return 2 * T * Tk > (T + Tk) * sequences * chunked_from(op, backend, inputs, with_state)


def describe(op: str, backend: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: cost.Form) -> str:
    """Return the kernels that a call runs, and their configuration."""
    chosen = BACKENDS[op][backend]
    if chosen.runs:
        return chosen.runs
    implementations: dict[str, Callable[[str], Any]] = {
        "softmax": softmax_ops.implementation,
        "quadratic": quadratic_ops.implementation,
        "feature_map": feature_map_ops.implementation,
    }
    return str(implementations[op](backend).describe(q, k, v, is_causal, form))


def effective_length(inputs: Inputs) -> float:
    """The side of a square of as many scores: T = Tk, or the harmonic mean of both; of a mean packed sequence."""
    T, Tk, sequences = inputs.q.shape[2], inputs.k.shape[2], inputs.sequences // inputs.q.shape[0]
    return 2 * T * Tk / ((T + Tk) * sequences)


def chunked_from(op: str, backend: str, inputs: Inputs, with_state: bool) -> float:
    """The length from which the chunked form of a backend is the faster one. A call with a state computes the sums
    anyway.
    """
    D, M = inputs.q.shape[3], inputs.v.shape[3]
    if op == "feature_map":
        if backend == "native":
            return 0.0  # its chunks are so short that sums win at every length
        length = 2 * D * M / (D + M) * (2 if inputs.is_causal else 1)
    else:
        length = calibration.chunked_from(_key(backend, inputs), D, M, is_causal=inputs.is_causal)
    return length / 2 if with_state else length


def source_of_length(op: str, backend: str, inputs: Inputs) -> str:
    """What `chunked_from` rests on, in words."""
    return "by flops" if op == "feature_map" else calibration.source(_key(backend, inputs))


def _key(backend: str, inputs: Inputs) -> str:
    return calibration.key_of(backend, _chosen.device or inputs.q.device.type, inputs.q.dtype)


@dataclass(frozen=True)
class Explanation:
    """What a call would do, and why. `str()` is meant to be read.

    Attributes:
        kernel: the public name. op: the operation behind it.
        backend, form: what was chosen. reason: why this form. runs: the kernels and their configuration.
        refused: backends that cannot run these inputs, and why.
        cost: predicted flops, bytes and memory of the chosen form.
    """

    kernel: str
    op: str
    backend: str
    form: str
    reason: str
    runs: str
    refused: dict[str, str]
    cost: cost.Cost

    def __str__(self) -> str:
        lines = [
            f"{self.kernel}: {self.form} form on backend '{self.backend}'",
            f"  why      {self.reason}",
            f"  runs     {self.runs}",
            f"  cost     {self.cost.flops / 1e9:.3g} GFLOP ({self.cost.flops_implemented / 1e9:.3g} as implemented), "
            f"{self.cost.bytes_moved / 2**20:.3g} MiB moved, {self.cost.memory_bytes / 2**20:.3g} MiB held",
        ]
        lines += [f"  refused  {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)
