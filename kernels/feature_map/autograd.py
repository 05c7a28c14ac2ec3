"""The differentiable feature-map attention that the public functions call."""

from __future__ import annotations

import functools

from linattn.kernels.common.op.stateful import attend
from linattn.kernels.feature_map import ops as ops  # registers the schemas

# (q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, plan) -> out, state
feature_map = functools.partial(attend, "feature_map")
