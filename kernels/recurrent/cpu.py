"""The recurrence by the native C++ kernels (native/recurrent.hpp): CPU tensors in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn._native import recurrent_backward, recurrent_forward
from linattn.kernels.common.native.binding import address
from linattn.kernels.recurrent.contract import CELLS, ForwardInputs, GradOutputs, Saved, gradients, outputs


def forward(inputs: ForwardInputs, save: bool) -> tuple[Tensor, ...]:
    """Run `recurrent_forward` (native/recurrent.cpp)."""
    made = all_h, last_h, last_c, cells, activations = outputs(inputs, save)
    projected = inputs.projected if inputs.projected.stride(2) == 1 else inputs.projected.contiguous()
    shared = _dense(inputs.weight_h, inputs.lengths, inputs.h0, inputs.c0)
    recurrent_forward(
        CELLS.index(inputs.cell), tuple(all_h.shape), _addresses(*shared, all_h, cells, activations),
        torch.get_num_threads(), (projected.data_ptr(), projected.stride(0), projected.stride(1)),
        _addresses(last_h, last_c),
    )  # fmt: skip
    return made


def backward(grad_outputs: GradOutputs, saved: Saved) -> tuple[Tensor, ...]:
    """Run `recurrent_backward` (native/recurrent.cpp)."""
    made = gradients(saved)
    shared = _dense(saved.weight_h, saved.lengths, saved.h0, saved.c0)
    dense = _dense(*grad_outputs)
    recurrent_backward(
        CELLS.index(saved.cell), tuple(saved.all_h.shape),
        _addresses(*shared, saved.all_h, saved.cells, saved.activations), torch.get_num_threads(),
        _addresses(*dense), _addresses(*made),
    )  # fmt: skip
    return made


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _addresses(*tensors: Tensor | None) -> list[int]:
    return list(map(address, tensors))
