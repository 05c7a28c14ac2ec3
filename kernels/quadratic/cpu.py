"""Quadratic-kernel attention by the native C++ kernels (native/quadratic.hpp): CPU tensors in fp32, bf16 and fp16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._native import QuadraticOptions, quadratic_backward, quadratic_forward
from linattn.kernels.common.native import binding
from linattn.kernels.common.native.binding import describe as describe
from linattn.kernels.quadratic.contract import Options, state_shapes

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs, Plan

FORMS = {"direct": 0, "chunked": 1, "recurrent": 2}


def forward(inputs: ForwardInputs) -> Outputs:
    """Run `quadratic_forward` (native/quadratic.cpp)."""
    return binding.forward(inputs, quadratic_forward, _native_options(inputs.options, inputs.plan), state_shapes)


def backward(inputs: BackwardInputs) -> Gradients:
    """Run `quadratic_backward` (native/quadratic.cpp)."""
    return binding.backward(inputs, quadratic_backward, _native_options(inputs.options, inputs.plan))


def _native_options(options: Options, plan: Plan) -> QuadraticOptions:
    return QuadraticOptions(options.c0, options.c1, options.c2, FORMS[plan.form], plan.chunk_size)
