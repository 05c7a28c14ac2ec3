"""The ops `linattn::feature_map_fwd` and `linattn::feature_map_bwd` (convention: kernels/common/op/stateful.py)."""

from __future__ import annotations

from linattn.kernels.common.op.backend import Backend, Call, anything, native, triton
from linattn.kernels.common.op.stateful import define_stateful
from linattn.kernels.feature_map.contract import SCHEMA, Options, state_shapes


def _native(call: Call) -> str:
    """The native kernels go through sums only: their chunks are short enough to win at every length."""
    if call.form == "direct":
        return native(call) or "form='direct': the native kernels go through sums, form='chunked'"
    return native(call)


# In the order in which "auto" tries them.
BACKENDS = {
    "native": Backend("linattn.kernels.feature_map.cpu", _native),
    "triton": Backend("linattn.kernels.feature_map.gpu", triton),
    "reference": Backend("linattn.kernels.feature_map.reference", anything, "plain PyTorch"),
}

define_stateful("feature_map", Options, SCHEMA, state_shapes, BACKENDS)
