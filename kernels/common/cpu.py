"""Tensors as the native kernels take them: addresses and strides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packed import sequence_bounds

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Strided = tuple[int, int, int, int]


class Prepared(NamedTuple):
    """A call's `_native.Problem`, and the tensors that must outlive it."""

    problem: Any
    tensors: tuple[Tensor | None, ...]


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
    normalize: bool,
) -> Prepared:
    """What all ops share of a call. Raises ArgumentError unless cu_seqlens partitions the rows."""
    from linattn._native import Problem

    (B, H, Tq, D), (Hkv, Tk, M) = q.shape, v.shape[1:]
    if cu_seqlens is not None:
        sequence_bounds(cu_seqlens, Tq)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    key_mask = None if key_mask is None else key_mask.contiguous()
    problem = Problem(
        DTYPES[q.dtype],
        (B, H, Hkv, Tq, Tk, D, M),
        strided(q),
        strided(k),
        strided(v),
        address(key_mask),
        address(cu_seqlens),
        B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        is_causal,
        q_offset,
        scale,
        normalize,
        torch.get_num_threads(),
    )
    return Prepared(problem, (q, k, v, key_mask, cu_seqlens))


def unit_last_stride(x: Tensor) -> Tensor:
    """x, copied if its last stride is not 1."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def strided(x: Tensor) -> Strided:
    """Address and the strides of B, H and T of a tensor whose last stride is 1."""
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
