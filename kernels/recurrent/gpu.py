"""The recurrence on a GPU: for each step one product, by torch, and one kernel for all the rest of the cell.

Everything is computed in fp32; c and its gradient stay in it from step to step, h is a factor of the product and has
the dtype of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.kernels.common.gpu.launch import launch
from linattn.kernels.recurrent.contract import ForwardInputs, GradOutputs, Saved, gradients, outputs

BLOCK = 256
"""Units of one sequence in a program."""


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + e^-x)."""
    e = tl.exp(-tl.abs(x))  # of a negative number: never infinite
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def tanh(x):
    """Compute (1 - e^-2x) / (1 + e^-2x)."""
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def load_gate(ptr, index, H, offs, mask):
    """Load gate 0 to 3 (i, f, g, o) of a sequence, where all four lie side by side."""
    return tl.load(ptr + index * H + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def step_kernel(
    z_ptr,
    h_ptr,
    c_ptr,
    o_ptr,
    cells_ptr,
    gates_ptr,
    lengths_ptr,
    stride_o,
    stride_cells,
    stride_gates,
    t,
    H,
    CELL: tl.constexpr,
    PADDED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute h_t from z_t and the state [B, H], in place, and store it in the output.

    lstm: c_t = f c_(t-1) + i g, h_t = o tanh(c_t). Else h_t = tanh(z_t), relu(z_t) or z_t.
    """
    # Over 60 lines: the signature.
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs < H
    h_ptr += b * H
    if PADDED:
        runs = t < tl.load(lengths_ptr + b)
    if CELL == "lstm":
        z_ptr += b * 4 * H
        c_ptr += b * H
        i, f = sigmoid(load_gate(z_ptr, 0, H, offs, mask)), sigmoid(load_gate(z_ptr, 1, H, offs, mask))
        g, o = tanh(load_gate(z_ptr, 2, H, offs, mask)), sigmoid(load_gate(z_ptr, 3, H, offs, mask))
        before = tl.load(c_ptr + offs, mask=mask, other=0.0)
        c = f * before + i * g
        h = o * tanh(c)
        if SAVE:
            gates_ptr += b * stride_gates
            tl.store(gates_ptr + offs, i, mask=mask)
            tl.store(gates_ptr + H + offs, f, mask=mask)
            tl.store(gates_ptr + 2 * H + offs, g, mask=mask)
            tl.store(gates_ptr + 3 * H + offs, o, mask=mask)
            tl.store(cells_ptr + b * stride_cells + offs, c, mask=mask)
        if PADDED:
            c = tl.where(runs, c, before)
        tl.store(c_ptr + offs, c, mask=mask)
    else:
        h = tl.load(z_ptr + b * H + offs, mask=mask, other=0.0).to(tl.float32)
        if CELL == "tanh":
            h = tanh(h)
        elif CELL == "relu":
            h = tl.where(h < 0, 0.0, h)  # NaN stays NaN
    if PADDED:
        h_next = tl.where(runs, h, tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32))
        h = tl.where(runs, h, 0.0)
    else:
        h_next = h
    tl.store(h_ptr + offs, h_next, mask=mask)
    tl.store(o_ptr + b * stride_o + offs, h, mask=mask)


@triton.jit
def step_backward_kernel(
    dh_product_ptr,
    dh_ended_ptr,
    dc_ptr,
    dout_ptr,
    o_ptr,
    c_ptr,
    c_before_ptr,
    gates_ptr,
    dz_ptr,
    lengths_ptr,
    stride_dout,
    stride_o,
    stride_c,
    stride_c_before,
    stride_gates,
    stride_dz,
    t,
    H,
    CELL: tl.constexpr,
    PADDED: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute dz_t from the gradients to the state after step t, dh = dh_product + dh_ended and dc.

    dc and dh_ended become those to the state before; dh_ended is what passes by sequences that have ended. lstm, with
    e = dc + dh o (1 - tanh(c)^2): di = e g i (1 - i), df = e c_(t-1) f (1 - f), dg = e i (1 - g^2),
    do = dh tanh(c) o (1 - o), dc_(t-1) = e f.
    """
    # Over 60 lines: the signature.
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs < H
    dz_ptr += b * stride_dz
    dh = tl.load(dh_product_ptr + b * H + offs, mask=mask, other=0.0).to(tl.float32)
    if PADDED:
        runs = t < tl.load(lengths_ptr + b)
        dh += tl.load(dh_ended_ptr + b * H + offs, mask=mask, other=0.0)
        tl.store(dh_ended_ptr + b * H + offs, tl.where(runs, 0.0, dh), mask=mask)
    d = dh
    if OUT:
        d += tl.load(dout_ptr + b * stride_dout + offs, mask=mask, other=0.0).to(tl.float32)
    if CELL == "lstm":
        gates_ptr += b * stride_gates
        i, f = load_gate(gates_ptr, 0, H, offs, mask), load_gate(gates_ptr, 1, H, offs, mask)
        g, o = load_gate(gates_ptr, 2, H, offs, mask), load_gate(gates_ptr, 3, H, offs, mask)
        tanh_c = tanh(tl.load(c_ptr + b * stride_c + offs, mask=mask, other=0.0).to(tl.float32))
        before = tl.load(c_before_ptr + b * stride_c_before + offs, mask=mask, other=0.0).to(tl.float32)
        dc = tl.load(dc_ptr + b * H + offs, mask=mask, other=0.0)
        e = dc + d * o * (1 - tanh_c * tanh_c)
        di, df = e * g * i * (1 - i), e * before * f * (1 - f)
        dg, do = e * i * (1 - g * g), d * tanh_c * o * (1 - o)
        e = e * f
        if PADDED:  # what is saved of a step that did not run may be anything
            di, df = tl.where(runs, di, 0.0), tl.where(runs, df, 0.0)
            dg, do = tl.where(runs, dg, 0.0), tl.where(runs, do, 0.0)
            e = tl.where(runs, e, dc)
        tl.store(dz_ptr + offs, di, mask=mask)
        tl.store(dz_ptr + H + offs, df, mask=mask)
        tl.store(dz_ptr + 2 * H + offs, dg, mask=mask)
        tl.store(dz_ptr + 3 * H + offs, do, mask=mask)
        tl.store(dc_ptr + b * H + offs, e, mask=mask)
    else:
        h = tl.load(o_ptr + b * stride_o + offs, mask=mask, other=0.0).to(tl.float32)
        if CELL == "tanh":
            d = d * (1 - h * h)
        elif CELL == "relu":
            d = tl.where(h > 0, d, 0.0)
        if PADDED:
            d = tl.where(runs, d, 0.0)
        tl.store(dz_ptr + offs, d, mask=mask)


def forward(inputs: ForwardInputs, save: bool) -> tuple[Tensor, ...]:
    """Compute the op's results, step by step; `save`: also what the backward pass needs."""
    results = all_h, last_h, last_c, cells, activations = outputs(inputs, save)
    projected, h0, c0 = inputs.projected, inputs.h0, inputs.c0
    lengths = None if inputs.lengths is None else inputs.lengths.contiguous()
    # The state of every step lies in the same memory; h ends where it is returned.
    h, c = last_h.copy_(h0), h0 if c0 is None else _copy(c0)
    z, weight = projected.new_empty(projected.shape[0], inputs.weight_h.shape[0]), inputs.weight_h.t()
    for t in range(projected.shape[1]):
        torch.addmm(projected[:, t], h, weight, out=z)
        _launch(
            step_kernel,
            h0,
            lengths,
            z_ptr=z,
            h_ptr=h,
            c_ptr=c,
            o_ptr=_at_step(all_h, t),
            cells_ptr=_at_step(cells, t),
            gates_ptr=_at_step(activations, t),
            stride_o=all_h.stride(0),
            stride_cells=cells.stride(0),
            stride_gates=activations.stride(0),
            t=t,
            CELL=inputs.cell,
            SAVE=save,
        )
    if c0 is not None:
        last_c.copy_(c)
    return results


def backward(grad_outputs: GradOutputs, saved: Saved) -> tuple[Tensor, ...]:
    """Compute the op's gradients, from the last step to the first."""
    results = dprojected, dh0, dc0 = gradients(saved)
    h0, c0, all_h, cells = saved.h0, saved.c0, saved.all_h, saved.cells
    lengths = None if saved.lengths is None else saved.lengths.contiguous()
    dh_product = torch.zeros_like(dh0) if grad_outputs.last_h is None else dh0.copy_(grad_outputs.last_h)
    dh_ended = torch.zeros_like(dh0, dtype=torch.float32)
    dc = torch.zeros_like(dh_ended) if grad_outputs.last_c is None else _copy(grad_outputs.last_c)
    dout = grad_outputs.all_h
    if dout is not None and dout.stride(2) != 1:
        dout = dout.contiguous()
    given_dout = all_h if dout is None else dout
    c_first = h0 if c0 is None else c0.contiguous()
    for t in reversed(range(all_h.shape[1])):
        _launch(
            step_backward_kernel,
            h0,
            lengths,
            dh_product_ptr=dh_product,
            dh_ended_ptr=dh_ended,
            dc_ptr=dc,
            dout_ptr=_at_step(given_dout, t),
            o_ptr=_at_step(all_h, t),
            c_ptr=_at_step(cells, t),
            c_before_ptr=_at_step(cells, t - 1) if t > 0 else c_first,
            gates_ptr=_at_step(saved.activations, t),
            dz_ptr=dprojected[:, t],
            stride_dout=given_dout.stride(0),
            stride_o=all_h.stride(0),
            stride_c=cells.stride(0),
            stride_c_before=cells.stride(0) if t > 0 else c_first.stride(0),
            stride_gates=saved.activations.stride(0),
            stride_dz=dprojected.stride(0),
            t=t,
            CELL=saved.cell,
            OUT=dout is not None,
        )
        torch.mm(dprojected[:, t], saved.weight_h, out=dh_product)
    dh0.copy_(dh_product + dh_ended)
    if c0 is not None:
        dc0.copy_(dc)
    return results


def _copy(x: Tensor) -> Tensor:
    """Copy to dense fp32: never x itself."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _at_step(x: Tensor, t: int) -> Tensor:
    """Return step t of `x [B, T, size]`; of what a call does not have, anything."""
    return x[:, t] if x.numel() else x


def _launch(kernel: Any, h0: Tensor, lengths: Tensor | None, **arguments: Any) -> None:
    """Launch one program for each block of units of each sequence."""
    B, H = h0.shape
    if B > 0:
        launch(
            kernel,
            (B, triton.cdiv(H, BLOCK)),
            num_warps=4,
            num_stages=1,
            lengths_ptr=h0 if lengths is None else lengths,
            H=H,
            PADDED=lengths is not None,
            BLOCK_H=BLOCK,
            **arguments,
        )
