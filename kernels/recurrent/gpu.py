"""The recurrence on a GPU: for each step one product, by torch, and one kernel for all the rest of the cell.

Everything is computed in fp32; c and its gradient stay in it from step to step, h is what the product reads and has the
dtype of the inputs.
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
"""Units of one batch row in a program."""


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # of a negative number: never infinite
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def gate(ptr, index, H, offs, inside):
    """Gate 0 to 3 (i, f, g, o) of a batch row that holds all four."""
    return tl.load(ptr + index * H + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def step(
    z_ptr, h_ptr, c_ptr, out_ptr, cells_ptr, gates_ptr, lengths_ptr,
    stride_out, stride_cells, stride_gates, t, H,
    CELL: tl.constexpr, PADDED: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From z and the state [B, H] to the next state, in place, and its row of the output."""
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < H
    h_ptr += b * H
    if PADDED:
        runs = t < tl.load(lengths_ptr + b)
    if CELL == "lstm":
        z_ptr += b * 4 * H
        c_ptr += b * H
        i, f = sigmoid(gate(z_ptr, 0, H, offs, inside)), sigmoid(gate(z_ptr, 1, H, offs, inside))
        g, o = tanh(gate(z_ptr, 2, H, offs, inside)), sigmoid(gate(z_ptr, 3, H, offs, inside))
        before = tl.load(c_ptr + offs, mask=inside, other=0.0)
        c = f * before + i * g
        h = o * tanh(c)
        if SAVE:
            gates_ptr += b * stride_gates
            tl.store(gates_ptr + offs, i, mask=inside)
            tl.store(gates_ptr + H + offs, f, mask=inside)
            tl.store(gates_ptr + 2 * H + offs, g, mask=inside)
            tl.store(gates_ptr + 3 * H + offs, o, mask=inside)
            tl.store(cells_ptr + b * stride_cells + offs, c, mask=inside)
        if PADDED:
            c = tl.where(runs, c, before)
        tl.store(c_ptr + offs, c, mask=inside)
    else:
        h = tl.load(z_ptr + b * H + offs, mask=inside, other=0.0).to(tl.float32)
        if CELL == "tanh":
            h = tanh(h)
        elif CELL == "relu":
            h = tl.where(h < 0, 0.0, h)  # NaN stays NaN
    if PADDED:
        kept = tl.where(runs, h, tl.load(h_ptr + offs, mask=inside, other=0.0).to(tl.float32))
        h = tl.where(runs, h, 0.0)
    else:
        kept = h
    tl.store(h_ptr + offs, kept, mask=inside)
    tl.store(out_ptr + b * stride_out + offs, h, mask=inside)


@triton.jit
def step_back(
    pulled_ptr, through_ptr, dc_ptr, dout_ptr, out_ptr, c_ptr, before_ptr, gates_ptr, dz_ptr, lengths_ptr,
    stride_dout, stride_out, stride_c, stride_before, stride_gates, stride_dz, t, H,
    CELL: tl.constexpr, PADDED: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the state after a step, `pulled` + `through` and dc, to dz. dc and `through` become those
    of the state before, where `through` is what passes sequences that have ended.
    """
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < H
    dz_ptr += b * stride_dz
    dh = tl.load(pulled_ptr + b * H + offs, mask=inside, other=0.0).to(tl.float32)
    if PADDED:
        runs = t < tl.load(lengths_ptr + b)
        dh += tl.load(through_ptr + b * H + offs, mask=inside, other=0.0)
        tl.store(through_ptr + b * H + offs, tl.where(runs, 0.0, dh), mask=inside)
    d = dh
    if OUT:
        d += tl.load(dout_ptr + b * stride_dout + offs, mask=inside, other=0.0).to(tl.float32)
    if CELL == "lstm":
        gates_ptr += b * stride_gates
        i, f = gate(gates_ptr, 0, H, offs, inside), gate(gates_ptr, 1, H, offs, inside)
        g, o = gate(gates_ptr, 2, H, offs, inside), gate(gates_ptr, 3, H, offs, inside)
        bent = tanh(tl.load(c_ptr + b * stride_c + offs, mask=inside, other=0.0).to(tl.float32))
        before = tl.load(before_ptr + b * stride_before + offs, mask=inside, other=0.0).to(tl.float32)
        dc = tl.load(dc_ptr + b * H + offs, mask=inside, other=0.0)
        e = dc + d * o * (1 - bent * bent)
        di, df = e * g * i * (1 - i), e * before * f * (1 - f)
        dg, do = e * i * (1 - g * g), d * bent * o * (1 - o)
        e = e * f
        if PADDED:  # what is saved of a step that did not run may be anything
            di, df = tl.where(runs, di, 0.0), tl.where(runs, df, 0.0)
            dg, do = tl.where(runs, dg, 0.0), tl.where(runs, do, 0.0)
            e = tl.where(runs, e, dc)
        tl.store(dz_ptr + offs, di, mask=inside)
        tl.store(dz_ptr + H + offs, df, mask=inside)
        tl.store(dz_ptr + 2 * H + offs, dg, mask=inside)
        tl.store(dz_ptr + 3 * H + offs, do, mask=inside)
        tl.store(dc_ptr + b * H + offs, e, mask=inside)
    else:
        h = tl.load(out_ptr + b * stride_out + offs, mask=inside, other=0.0).to(tl.float32)
        if CELL == "tanh":
            d = d * (1 - h * h)
        elif CELL == "relu":
            d = tl.where(h > 0, d, 0.0)
        if PADDED:
            d = tl.where(runs, d, 0.0)
        tl.store(dz_ptr + offs, d, mask=inside)


def forward(inputs: ForwardInputs, save: bool) -> tuple[Tensor, ...]:
    made = all_h, last_h, last_c, cells, activations = outputs(inputs, save)
    inputs = inputs._replace(lengths=_dense(inputs.lengths))
    projected, h0, c0 = inputs.projected, inputs.h0, inputs.c0
    # The state of every step lies in the same memory; h ends where it is returned.
    h, c = last_h.copy_(h0), h0 if c0 is None else _copied(c0)
    z, recurrent = projected.new_empty(projected.shape[0], inputs.weight_h.shape[0]), inputs.weight_h.t()
    for t in range(projected.shape[1]):
        torch.addmm(projected[:, t], h, recurrent, out=z)
        _launch(
            step, inputs, t, z_ptr=z, h_ptr=h, c_ptr=c, SAVE=save,
            **_rows("out", all_h, t), **_rows("cells", cells, t), **_rows("gates", activations, t),
        )  # fmt: skip
    if c0 is not None:
        last_c.copy_(c)
    return made


def backward(grad_outputs: GradOutputs, saved: Saved) -> tuple[Tensor, ...]:
    made = dprojected, dh0, dc0 = gradients(saved)
    saved = saved._replace(lengths=_dense(saved.lengths))
    h0, c0, all_h, cells = saved.h0, saved.c0, saved.all_h, saved.cells
    pulled = torch.zeros_like(dh0) if grad_outputs.last_h is None else dh0.copy_(grad_outputs.last_h)
    through = torch.zeros_like(dh0, dtype=torch.float32)
    dc = torch.zeros_like(through) if grad_outputs.last_c is None else _copied(grad_outputs.last_c)
    dout = grad_outputs.all_h
    if dout is not None and dout.stride(2) != 1:
        dout = dout.contiguous()
    first = h0 if c0 is None else c0.contiguous()
    for t in reversed(range(all_h.shape[1])):
        before = _rows("before", cells, t - 1) if t > 0 else {"before_ptr": first, "stride_before": first.stride(0)}
        _launch(
            step_back, saved, t, pulled_ptr=pulled, through_ptr=through, dc_ptr=dc, OUT=dout is not None,
            **_rows("dout", all_h if dout is None else dout, t), **_rows("out", all_h, t), **_rows("c", cells, t),
            **before, **_rows("gates", saved.activations, t), **_rows("dz", dprojected, t),
        )  # fmt: skip
        torch.mm(dprojected[:, t], saved.weight_h, out=pulled)
    dh0.copy_(pulled + through)
    if c0 is not None:
        dc0.copy_(dc)
    return made


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _copied(x: Tensor) -> Tensor:
    """Dense, in fp32, and never x itself."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _rows(name: str, x: Tensor, t: int) -> dict[str, Any]:
    """The rows of step t of `x [B, T, size]` as a kernel is inputs them; of what a call does not have, anything."""
    return {f"{name}_ptr": x[:, t] if x.numel() else x, f"stride_{name}": x.stride(0)}


def _launch(kernel: Any, inputs: ForwardInputs | Saved, t: int, **arguments: Any) -> None:
    (B, H), lengths = inputs.h0.shape, inputs.lengths
    if B > 0:
        launch(
            kernel, (B, triton.cdiv(H, BLOCK)), num_warps=4, num_stages=1, t=t, H=H, CELL=inputs.cell, BLOCK=BLOCK,
            PADDED=lengths is not None, lengths_ptr=inputs.h0 if lengths is None else lengths, **arguments,
        )  # fmt: skip
