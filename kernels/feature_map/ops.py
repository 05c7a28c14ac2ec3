"""The ops `linattn::feature_map_fwd` and `linattn::feature_map_bwd` (convention: kernels/common/stateful.py)."""

from __future__ import annotations

from ..common.stateful import define_stateful
from .contract import SCHEMA, Options, state_shapes

BACKENDS = {"reference": "linattn.kernels.feature_map.reference"}

define_stateful("feature_map", Options, SCHEMA, state_shapes, BACKENDS)
