"""The ops `linattn::quadratic_fwd` and `linattn::quadratic_bwd` (convention: kernels/common/op/stateful.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn.kernels.common.op.backend import Backend, BackendQuery, anything, native, triton
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, StatefulOp
from linattn.kernels.quadratic.contract import SCHEMA, Options, state_shapes

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import Gradients, Implementation, Outputs

LARGEST_HEAD_WITH_STATE = 128


def _triton(query: BackendQuery) -> str:
    """Keep sums over keys in blocks that Triton can hold in registers, up to a head size of 128."""
    if max(query.D, query.M) > LARGEST_HEAD_WITH_STATE and (query.form == "chunked" or query.with_state):
        sizes = f"head sizes beyond {LARGEST_HEAD_WITH_STATE}, D = {query.D}, M = {query.M}"
        return f"{sizes}, are computed only in the direct form and without a state"
    if query.form == "recurrent" and query.T > 1:
        return f"form='recurrent' with T = {query.T} tokens: form='chunked' gives the same"
    return triton(query)


# In the order in which "auto" tries them; a new one is a row here and a case below.
BACKENDS = {
    "native": Backend(native),
    "triton": Backend(_triton),
    "reference": Backend(anything, "plain PyTorch"),
}


def implementation(backend: str) -> Implementation:
    """Return a backend's module, imported when first called."""
    match backend:
        case "native":
            from linattn.kernels.quadratic import cpu

            return cpu
        case "triton":
            from linattn.kernels.quadratic import gpu

            return gpu
        case _:
            from linattn.kernels.quadratic import reference

            return reference


def quadratic_fwd(*arguments: Any) -> Outputs:
    """Run `linattn::quadratic_fwd` on the backend that its last argument names."""
    inputs = ForwardInputs.from_op(Options, arguments)
    return implementation(inputs.plan.backend).forward(inputs)


def quadratic_bwd(*arguments: Any) -> Gradients:
    """Run `linattn::quadratic_bwd` on the backend that its last argument names."""
    inputs = BackwardInputs.from_op(Options, arguments)
    return implementation(inputs.plan.backend).backward(inputs)


StatefulOp("quadratic", Options, SCHEMA, state_shapes, implementation).define(quadratic_fwd, quadratic_bwd)
