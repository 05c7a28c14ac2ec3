"""The ops `linattn::recurrent_fwd` and `linattn::recurrent_bwd`: all T steps of one layer in one call.

The reference is no implementation of them: plain PyTorch is differentiated by autograd as it is (autograd.py).
"""

from __future__ import annotations

import torch

from linattn.kernels.common.op.backend import Backend, Call, anything, native, triton
from linattn.kernels.common.op.registration import define, implementation
from linattn.kernels.recurrent.contract import Arriving, Inputs, Walked, gradients, outputs


def _native(call: Call) -> str:
    refused = native(call)
    if not refused and call.dtype != torch.float32:
        return f"{call.dtype}: the native recurrence computes in fp32"
    return refused


# In the order in which "auto" tries them.
BACKENDS = {
    "native": Backend("linattn.kernels.recurrent.cpu", _native, "all steps in one C++ loop"),
    "triton": Backend("linattn.kernels.recurrent.gpu", triton, "a product and a fused kernel a step"),
    "reference": Backend("linattn.kernels.recurrent.reference", anything, "plain PyTorch, a step at a time"),
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


def _forward_fake(*given):
    *inputs, save, _ = given
    return outputs(Inputs(*inputs), save)


def _forward(*given):
    *inputs, save, backend = given
    return implementation(BACKENDS, backend).forward(Inputs(*inputs), save)


def _backward_fake(*given):
    return gradients(Walked(*given[3:-1]))


def _backward(*given):
    return implementation(BACKENDS, given[-1]).backward(Arriving(*given[:3]), Walked(*given[3:-1]))


define(FORWARD, _forward_fake, _forward)
define(BACKWARD, _backward_fake, _backward)
