"""The ops `linattn::quadratic_fwd` and `linattn::quadratic_bwd` (convention: kernels/common/op/stateful.py)."""

from __future__ import annotations

from linattn.kernels.common.op.backend import Backend, Call, anything, native, triton
from linattn.kernels.common.op.stateful import define_stateful
from linattn.kernels.quadratic.contract import SCHEMA, Options, state_shapes

LARGEST_FOLDED = 128


def _triton(call: Call) -> str:
    """Sums over keys are kept in blocks that Triton can hold in registers up to a head size of 128."""
    if max(call.D, call.M) > LARGEST_FOLDED and (call.form == "chunked" or call.with_state):
        sizes = f"head sizes beyond {LARGEST_FOLDED}, D = {call.D}, M = {call.M}"
        return f"{sizes}, are computed only in the direct form and without a state"
    if call.form == "recurrent" and call.T > 1:
        return f"form='recurrent' with T = {call.T} tokens: form='chunked' gives the same"
    return triton(call)


# In the order in which "auto" tries them.
BACKENDS = {
    "native": Backend("linattn.kernels.quadratic.cpu", native),
    "triton": Backend("linattn.kernels.quadratic.gpu", _triton),
    "reference": Backend("linattn.kernels.quadratic.reference", anything, "plain PyTorch"),
}

define_stateful("quadratic", Options, SCHEMA, state_shapes, BACKENDS)
