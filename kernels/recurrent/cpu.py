"""The recurrence by the native C++ kernels (native/recurrent.hpp): CPU tensors in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn._native import recurrent_backward, recurrent_forward
from linattn.kernels.common.native.binding import address
from linattn.kernels.recurrent.contract import CELLS, Arriving, Inputs, Walked, gradients, outputs


def forward(given: Inputs, save: bool) -> tuple[Tensor, ...]:
    made = all_h, last_h, last_c, cells, activations = outputs(given, save)
    projected = given.projected if given.projected.stride(2) == 1 else given.projected.contiguous()
    shared = _dense(given.weight_h, given.lengths, given.h0, given.c0)
    recurrent_forward(
        CELLS.index(given.cell), tuple(all_h.shape), _addresses(*shared, all_h, cells, activations),
        torch.get_num_threads(), (projected.data_ptr(), projected.stride(0), projected.stride(1)),
        _addresses(last_h, last_c),
    )  # fmt: skip
    return made


def backward(arriving: Arriving, walked: Walked) -> tuple[Tensor, ...]:
    made = gradients(walked)
    shared = _dense(walked.weight_h, walked.lengths, walked.h0, walked.c0)
    dense = _dense(*arriving)
    recurrent_backward(
        CELLS.index(walked.cell), tuple(walked.all_h.shape),
        _addresses(*shared, walked.all_h, walked.cells, walked.activations), torch.get_num_threads(),
        _addresses(*dense), _addresses(*made),
    )  # fmt: skip
    return made


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _addresses(*tensors: Tensor | None) -> list[int]:
    return list(map(address, tensors))
