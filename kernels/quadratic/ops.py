"""The ops `linattn::quadratic_fwd` and `linattn::quadratic_bwd` (convention: kernels/common/stateful.py)."""

from __future__ import annotations

from ..common.stateful import define_stateful
from .contract import SCHEMA, Options, state_shapes

BACKENDS = {"reference": "linattn.kernels.quadratic.reference"}

define_stateful("quadratic", Options, SCHEMA, state_shapes, BACKENDS)
