"""The recurrence by the native C++ kernels (cpu.hpp): CPU tensors in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn._native import recurrent_backward, recurrent_forward

from ..common.cpu import address
from .contract import CELLS, gradients, outputs


def forward(
    projected: Tensor,
    weight_h: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    cell: str,
    save: bool,
) -> tuple[Tensor, ...]:
    made = outputs(projected, h0, cell, save)
    all_h, last_h, last_c, cells, activations = made
    projected = projected if projected.stride(2) == 1 else projected.contiguous()
    shared = _dense(weight_h, lengths, h0, c0)
    recurrent_forward(
        CELLS.index(cell), tuple(all_h.shape), _addresses(*shared, all_h, cells, activations), torch.get_num_threads(),
        (projected.data_ptr(), projected.stride(0), projected.stride(1)), _addresses(last_h, last_c),
    )  # fmt: skip
    return made


def backward(
    dall_h: Tensor | None,
    dlast_h: Tensor | None,
    dlast_c: Tensor | None,
    weight_h: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    all_h: Tensor,
    cells: Tensor,
    activations: Tensor,
    cell: str,
) -> tuple[Tensor, ...]:
    made = gradients(weight_h, h0, all_h, cell)
    shared = _dense(weight_h, lengths, h0, c0)
    arriving = _dense(dall_h, dlast_h, dlast_c)
    recurrent_backward(
        CELLS.index(cell), tuple(all_h.shape), _addresses(*shared, all_h, cells, activations), torch.get_num_threads(),
        _addresses(*arriving), _addresses(*made),
    )  # fmt: skip
    return made


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _addresses(*tensors: Tensor | None) -> list[int]:
    return list(map(address, tensors))
