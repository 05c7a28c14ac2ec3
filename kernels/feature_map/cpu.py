"""Feature-map attention by the native C++ kernels (native/feature_map.hpp): CPU tensors in fp32, bf16 and fp16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._native import FeatureMapOptions, feature_map_backward, feature_map_forward
from linattn.kernels.common.native import binding
from linattn.kernels.common.native.binding import describe as describe
from linattn.kernels.feature_map.contract import Options, state_shapes
from linattn.kernels.feature_map.maps import MAPS

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs, Plan


def forward(inputs: ForwardInputs) -> Outputs:
    """Run `feature_map_forward` (native/feature_map.cpp)."""
    return binding.forward(inputs, feature_map_forward, _native_options(inputs.options, inputs.plan), state_shapes)


def backward(inputs: BackwardInputs) -> Gradients:
    """Run `feature_map_backward` (native/feature_map.cpp)."""
    return binding.backward(inputs, feature_map_backward, _native_options(inputs.options, inputs.plan))


def _native_options(options: Options, plan: Plan) -> FeatureMapOptions:
    return FeatureMapOptions(MAPS[options.feature_map].native, 1 if plan.form == "recurrent" else plan.chunk_size)
