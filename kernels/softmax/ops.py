"""The ops `linattn::softmax_fwd` and `linattn::softmax_bwd`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.backend import Backend, anything, triton
from linattn.kernels.common.op.registration import define
from linattn.kernels.softmax.contract import BackwardInputs, ForwardInputs

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.softmax.contract import Implementation

# In the order in which "auto" tries them, after PyTorch's own: flash and cuDNN kernels of the vendor are what users
# compare with and expect. "triton" is for what those cannot take: key_mask, packed sequences, q_offset, D != M.
# A new one is a row here and a case below.
BACKENDS = {
    "triton": Backend(triton),
    "reference": Backend(anything, "plain PyTorch"),
}

_OPTIONS = "Tensor? key_mask, Tensor? cu_seqlens, bool is_causal, SymInt q_offset, float scale, str backend"
FORWARD = f"softmax_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)"
BACKWARD = f"""softmax_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}
) -> (Tensor dq, Tensor dk, Tensor dv)"""


def implementation(backend: str) -> Implementation:
    """Return a backend's module, imported when first called."""
    match backend:
        case "triton":
            from linattn.kernels.softmax import gpu

            return gpu
        case _:
            from linattn.kernels.softmax import reference

            return reference


def softmax_fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run `linattn::softmax_fwd` on the backend that its last argument names."""
    *inputs, backend = arguments
    return implementation(backend).forward(ForwardInputs(*inputs))


def softmax_bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `linattn::softmax_bwd` on the backend that its last argument names."""
    *inputs, backend = arguments
    return implementation(backend).backward(BackwardInputs(*inputs))


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = ForwardInputs(*arguments[:-1])
    return empty_in_storage_order(inputs.q, inputs.v.shape[3]), empty_row_sums(inputs.q)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = BackwardInputs(*arguments[:-1])
    return tuple(empty_in_storage_order(x, x.shape[3]) for x in (inputs.q, inputs.k, inputs.v))


define(FORWARD, _forward_fake, softmax_fwd)
define(BACKWARD, _backward_fake, softmax_bwd)
