"""The ops `linattn::quadratic_fwd` and `linattn::quadratic_bwd` (convention: kernels/common/stateful.py)."""

from __future__ import annotations

from ..common.backend import Backend, anything
from ..common.stateful import define_stateful
from .contract import SCHEMA, Options, state_shapes

# In the order in which "auto" tries them.
BACKENDS = {"reference": Backend("linattn.kernels.quadratic.reference", anything, "plain PyTorch")}

define_stateful("quadratic", Options, SCHEMA, state_shapes, BACKENDS)
