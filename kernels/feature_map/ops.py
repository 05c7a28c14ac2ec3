"""The ops `linattn::feature_map_fwd` and `linattn::feature_map_bwd` (convention: kernels/common/stateful.py)."""

from __future__ import annotations

from ..common.backend import Backend, anything, triton
from ..common.stateful import define_stateful
from .contract import SCHEMA, Options, state_shapes

# In the order in which "auto" tries them.
BACKENDS = {
    "triton": Backend("linattn.kernels.feature_map.gpu", triton),
    "reference": Backend("linattn.kernels.feature_map.reference", anything, "plain PyTorch"),
}

define_stateful("feature_map", Options, SCHEMA, state_shapes, BACKENDS)
