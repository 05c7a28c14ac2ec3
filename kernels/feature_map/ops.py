"""The ops `linattn::feature_map_fwd` and `linattn::feature_map_bwd` (convention: kernels/common/op/stateful.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn.kernels.common.op.backend import Backend, BackendQuery, anything, native, triton
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, StatefulOp
from linattn.kernels.feature_map.contract import SCHEMA, Options, state_shapes

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import Gradients, Implementation, Outputs


def _native(query: BackendQuery) -> str:
    """Refuse the direct form: the native kernels go through sums, in chunks short enough to win at every length."""
    if query.form == "direct":
        return native(query) or "form='direct': the native kernels go through sums, form='chunked'"
    return native(query)


# In the order in which "auto" tries them; a new one is a row here and a case below.
BACKENDS = {
    "native": Backend(_native),
    "triton": Backend(triton),
    "reference": Backend(anything, "plain PyTorch"),
}


def implementation(backend: str) -> Implementation:
    """Return a backend's module, imported when first called."""
    match backend:
        case "native":
            from linattn.kernels.feature_map import cpu

            return cpu
        case "triton":
            from linattn.kernels.feature_map import gpu

            return gpu
        case _:
            from linattn.kernels.feature_map import reference

            return reference


def feature_map_fwd(*arguments: Any) -> Outputs:
    """Run `linattn::feature_map_fwd` on the backend that its last argument names."""
    inputs = ForwardInputs.from_op(Options, arguments)
    return implementation(inputs.plan.backend).forward(inputs)


def feature_map_bwd(*arguments: Any) -> Gradients:
    """Run `linattn::feature_map_bwd` on the backend that its last argument names."""
    inputs = BackwardInputs.from_op(Options, arguments)
    return implementation(inputs.plan.backend).backward(inputs)


StatefulOp("feature_map", Options, SCHEMA, state_shapes, implementation).define(feature_map_fwd, feature_map_bwd)
