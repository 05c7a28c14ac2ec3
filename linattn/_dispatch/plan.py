"""Which backend and which form a call runs on: the first half of every public function.

`prepare_softmax`, `prepare_quadratic` and `prepare_linear` check a call and decide how it runs; the public functions
(linattn/functional.py) then run it, and `explain` (explain.py) tells what was decided.
"""

from __future__ import annotations

import inspect
import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linattn._dispatch import calibration, checks
from linattn.errors import ArgumentError, BackendError, ShapeError, refusal, unknown_name
from linattn.feature_maps import NAMES, FeatureMap, map_features
from linattn.kernels.common.op.allocation import accumulation_dtype
from linattn.kernels.common.op.backend import Backend, BackendQuery, anything
from linattn.kernels.common.op.stateful import Plan
from linattn.kernels.feature_map import contract as feature_map_contract
from linattn.kernels.feature_map import ops as feature_map_ops
from linattn.kernels.quadratic import contract as quadratic_contract
from linattn.kernels.quadratic import ops as quadratic_ops
from linattn.kernels.recurrent import ops as recurrent_ops
from linattn.kernels.softmax import ops as softmax_ops
from linattn.states import FeatureMapState, QuadraticState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


class _Chosen(threading.local):
    """A thread-local and not a ContextVar: that would break fullgraph compilation.

    An attribute of the instance and not of the class, where compiled code would not notice that it changes.
    """

    def __init__(self) -> None:
        self.backend = "auto"


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

    Args:
        backend: "auto", "reference", "native", "torch" or "triton".
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
    """Return the backend that a call names, or else the one of `use_backend` around it; "auto" if there is neither."""
    return _chosen.backend if backend == "auto" else backend


def backends(op: str) -> dict[str, str]:
    """List the backends of an op, "softmax", "quadratic", "feature_map" or "recurrent", and whether each runs here."""
    if op not in BACKENDS:
        raise unknown_name("operation", op, BACKENDS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    states = {}
    for name, backend in BACKENDS[op].items():
        query = BackendQuery("cpu" if name == "native" else device, torch.float32, 64, 64, "direct", named=True)
        states[name] = backend.refusal(query) or "available"
    return states


def refusals(op: str, inputs: Inputs, form: Form, with_state: bool) -> dict[str, str]:
    """Return why a backend of `op` cannot run these inputs, for those that cannot."""
    found = {}
    for name in BACKENDS[op]:
        _, found[name] = _suited(op, name, form, inputs, with_state, named=True)
    return {name: reason for name, reason in found.items() if reason}


def _refusal(op: str, backend: str, inputs: Inputs, form: cost.Form, with_state: bool, named: bool) -> str:
    if backend == "torch":
        return _beyond_torch(inputs)
    D, M, T = inputs.q.shape[3], inputs.v.shape[3], inputs.q.shape[2]
    query = BackendQuery(inputs.device, inputs.q.dtype, D, M, form, named, T, with_state)
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
    """Decide how an op is computed: on the backend that the call or `use_backend` names, or else on the first that can;
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
    return chosen


def _suited(op: str, backend: str, form: Form, inputs: Inputs, with_state: bool, named: bool) -> tuple[cost.Form, str]:
    """Return the form in which a backend would compute a call, and why it cannot, or "".

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


def describe(op: str, plan: Plan, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str:
    """Return the kernels that a call runs, and their configuration."""
    chosen = BACKENDS[op][plan.backend]
    if chosen.runs:
        return chosen.runs
    implementations: dict[str, Callable[[str], Any]] = {
        "softmax": softmax_ops.implementation,
        "quadratic": quadratic_ops.implementation,
        "feature_map": feature_map_ops.implementation,
    }
    return str(implementations[op](plan.backend).describe(q, k, v, is_causal, plan.form))


def effective_length(inputs: Inputs) -> float:
    """Return the side of a square of as many scores: the harmonic mean of T and Tk; of a mean packed sequence."""
    T, Tk, sequences = inputs.q.shape[2], inputs.k.shape[2], inputs.sequences // inputs.q.shape[0]
    return 2 * T * Tk / ((T + Tk) * sequences)


def chunked_from(op: str, backend: str, inputs: Inputs, with_state: bool) -> float:
    """Return the length from which the chunked form is the faster one; a call with a state computes the sums anyway."""
    D, M = inputs.q.shape[3], inputs.v.shape[3]
    if op == "feature_map":
        if backend == "native":
            return 0.0  # its chunks are so short that sums win at every length
        length = 2 * D * M / (D + M) * (2 if inputs.is_causal else 1)
    else:
        length = calibration.chunked_from(_key(backend, inputs), D, M, is_causal=inputs.is_causal)
    return length / 2 if with_state else length


def source_of_length(op: str, backend: str, inputs: Inputs) -> str:
    """Return what `chunked_from` rests on, in words."""
    return "by flops" if op == "feature_map" else calibration.source(_key(backend, inputs))


def _key(backend: str, inputs: Inputs) -> str:
    return calibration.key_of(backend, inputs.device, inputs.q.dtype)


# ---- the first half of a call ----------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A call that has passed its checks, and how it runs.

    Attributes:
        op: the operation, a key of `BACKENDS`.
        inputs: the tensors, autocast, and for feature maps that no kernel applies, mapped.
        options: those of the op (kernels/<op>/contract.py); for softmax, the scale alone.
        initial_state: its tensors, or ().
        with_state: a state stands before the call or is asked for after it.
        plan: form, backend and chunk size.
    """

    op: cost.Kernel
    inputs: Inputs
    options: Any
    initial_state: tuple[Tensor, ...]
    with_state: bool
    plan: Plan


def prepare_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Prepared:
    """Check a call of `softmax_attention` and decide how it runs."""
    inputs = checks.check_inputs(
        q, k, v, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else checks.check_scale(scale)
    chosen = plan("softmax", inputs, "direct", backend, with_state=False)
    return Prepared("softmax", inputs, scale, (), False, chosen)


def prepare_quadratic(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    scale: float = 1.0,
    coefficients: Sequence[float] = (1, 2, 1),
    normalize: bool = True,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: QuadraticState | None = None,
    return_state: bool = False,
    form: Form = "auto",
    backend: str = "auto",
) -> Prepared:
    """Check a call of `quadratic_attention` and decide how it runs."""
    inputs = checks.check_inputs(
        q, k, v, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    checks.check_form(form, is_causal)
    shapes = quadratic_contract.state_shapes(inputs.sequences, k.shape[1], k.shape[3], v.shape[3])
    before = checks.check_state(initial_state, QuadraticState, shapes, accumulation_dtype(inputs.q.dtype), q.device)
    c0, c1, c2 = checks.check_coefficients(coefficients, normalize)
    scale = checks.check_scale(scale)
    options = quadratic_contract.Options(is_causal, inputs.q_offset, scale, c0, c1, c2, normalize)
    with_state = return_state or bool(before)
    chosen = plan("quadratic", inputs, form, backend, with_state)
    return Prepared("quadratic", inputs, options, before, with_state, chosen)


def prepare_linear(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu+1",
    is_causal: bool = False,
    scale: float = 1.0,
    normalize: bool = True,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: FeatureMapState | None = None,
    return_state: bool = False,
    form: Form = "auto",
    backend: str = "auto",
    with_data: bool = True,
) -> Prepared:
    """Check a call of `linear_attention` and decide how it runs; map q and k where no kernel does.

    `with_data` False maps shapes alone: the tensors of the result are then on the device "meta".
    """
    inputs = checks.check_inputs(
        q, k, v, is_causal=is_causal, key_mask=key_mask, q_offset=q_offset, enable_gqa=enable_gqa, cu_seqlens=cu_seqlens
    )
    checks.check_form(form, is_causal)
    scale = checks.check_scale(scale)
    if normalize and scale <= 0:
        raise refusal(
            ArgumentError,
            "normalize=True needs a positive scale, or the similarity is negative",
            given=scale,
            accepted="scale > 0, or normalize=False",
        )
    mq, mk, mask = inputs.q, inputs.k, key_mask
    if not with_data:
        mq, mk, mask = mq.to("meta"), mk.to("meta"), None if mask is None else mask.to("meta")
    fq, fk, name = map_features(mq, mk, feature_map, normalize, mask)
    inputs = inputs._replace(q=fq, k=fk)
    shapes = feature_map_contract.state_shapes(inputs.sequences, k.shape[1], fk.shape[3], v.shape[3])
    before = checks.check_state(initial_state, FeatureMapState, shapes, accumulation_dtype(inputs.q.dtype), q.device)
    options = feature_map_contract.Options(is_causal, inputs.q_offset, scale, name, normalize)
    with_state = return_state or bool(before)
    chosen = plan("feature_map", inputs, form, backend, with_state)
    return Prepared("feature_map", inputs, options, before, with_state, chosen)


# ---- by name ---------------------------------------------------------------------------------------------------------

POLYNOMIAL = ("quadratic", "taylor")
TAYLOR = (1.0, 1.0, 0.5)


class NamedKernel(NamedTuple):
    """The operation behind a kernel's name.

    Attributes:
        op: a key of `BACKENDS`.
        prepare: the first half of its public function.
        defaults: the options that the name stands for.
    """

    op: cost.Kernel
    prepare: Callable[..., Prepared]
    defaults: dict[str, Any]


def resolve(kernel: str, q: Tensor, options: dict[str, Any]) -> NamedKernel:
    """Return what a kernel's name stands for; raise on an option that it does not have."""
    if not isinstance(q, Tensor) or q.dim() != 4:
        given = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise refusal(ShapeError, "q must have four dimensions", given=given, accepted="[B, H, T, D]")
    if kernel == "softmax":
        named = NamedKernel("softmax", prepare_softmax, {})
    elif kernel == "quadratic":
        named = NamedKernel("quadratic", prepare_quadratic, {})
    elif kernel == "taylor":
        defaults = {"coefficients": TAYLOR, "scale": 1 / math.sqrt(q.shape[3])}
        named = NamedKernel("quadratic", prepare_quadratic, defaults)
    elif kernel in NAMES:
        named = NamedKernel("feature_map", prepare_linear, {"feature_map": kernel})
    else:
        raise unknown_name("kernel", kernel, ("softmax", *POLYNOMIAL, *NAMES))
    keywords = [name for name, p in inspect.signature(named.prepare).parameters.items() if p.kind is p.KEYWORD_ONLY]
    accepted = [name for name in keywords if name not in ("feature_map", "with_data")]  # the kernel's name is the map
    for name in options:
        if name not in accepted:
            raise unknown_name(f"option of kernel {kernel!r}", name, accepted)
    return named
