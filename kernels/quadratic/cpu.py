"""Quadratic-kernel attention by the native C++ kernels (native/quadratic.hpp): CPU tensors in fp32, bf16 and fp16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn._native import QuadraticOptions, quadratic_backward, quadratic_forward
from linattn.kernels.common.native.binding import NativeOp
from linattn.kernels.common.native.binding import describe as describe
from linattn.kernels.quadratic.contract import Options, state_shapes

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import Plan

FORMS = {"direct": 0, "chunked": 1, "recurrent": 2}


def _native_options(options: Options, plan: Plan) -> QuadraticOptions:
    return QuadraticOptions(options.c0, options.c1, options.c2, FORMS[plan.form], plan.chunk_size)


_op = NativeOp(quadratic_forward, quadratic_backward, _native_options, state_shapes)
forward, backward = _op.forward, _op.backward
