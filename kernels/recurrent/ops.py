"""The ops `linattn::recurrent_fwd` and `linattn::recurrent_bwd`: all T steps of one layer in one call.

The reference is no implementation of them: plain PyTorch is differentiated by autograd as it is (autograd.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linattn.kernels.common.op.backend import Backend, BackendQuery, anything, native, triton
from linattn.kernels.common.op.registration import define
from linattn.kernels.recurrent.contract import ForwardInputs, GradOutputs, Saved, gradients, outputs

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.recurrent.contract import Implementation


def _native(query: BackendQuery) -> str:
    refused = native(query)
    if not refused and query.dtype != torch.float32:
        return f"{query.dtype}: the native recurrence computes in fp32"
    return refused


# In the order in which "auto" tries them. The reference is no op.
BACKENDS = {
    "native": Backend(_native, "all steps in one C++ loop"),
    "triton": Backend(triton, "a product and a fused kernel a step"),
    "reference": Backend(anything, "plain PyTorch, a step at a time"),
}

# projected [B, T, G H], weight_h [G H, H], h0 and c0 [B, H], lengths int64 [B]. The forward pass returns all_h
# [B, T, H], last_h, last_c and what the backward pass of an LSTM reads: every c_t [B, T, H], every i, f, g, o
# [B, T, 4 H]. What a call does not have is empty.
FORWARD = """recurrent_fwd(
    Tensor projected, Tensor weight_h, Tensor h0, Tensor? c0, Tensor? lengths, str cell, bool save, str backend
) -> (Tensor all_h, Tensor last_h, Tensor last_c, Tensor cells, Tensor activations)"""
BACKWARD = """recurrent_bwd(
    Tensor? dall_h, Tensor? dlast_h, Tensor? dlast_c, Tensor weight_h, Tensor h0, Tensor? c0, Tensor? lengths,
    Tensor all_h, Tensor cells, Tensor activations, str cell, str backend
) -> (Tensor dprojected, Tensor dh0, Tensor dc0)"""


def implementation(backend: str) -> Implementation:
    """Return a backend's module, imported when first called."""
    match backend:
        case "native":
            from linattn.kernels.recurrent import cpu

            return cpu
        case _:
            from linattn.kernels.recurrent import gpu

            return gpu


def recurrent_fwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Run `linattn::recurrent_fwd` on the backend that its last argument names."""
    *inputs, save, backend = arguments
    return implementation(backend).forward(ForwardInputs(*inputs), save)


def recurrent_bwd(*arguments: Any) -> tuple[Tensor, ...]:
    """Run `linattn::recurrent_bwd` on the backend that its last argument names."""
    *inputs, backend = arguments
    return implementation(backend).backward(GradOutputs(*inputs[:3]), Saved(*inputs[3:]))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, save, _ = arguments
    return outputs(ForwardInputs(*inputs), save)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return gradients(Saved(*arguments[3:-1]))


define(FORWARD, _forward_fake, recurrent_fwd)
define(BACKWARD, _backward_fake, recurrent_bwd)
