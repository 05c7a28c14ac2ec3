"""One allocator for the real ops and their fakes, so that compiled code sees the strides that eager code makes."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_in_storage_order(like: Tensor, last: int) -> Tensor:
    """Allocate `[B, H, T, last]` dense, with H and T in the order in which `like` stores them.

    A `[B, T, H, D]`-stored query gives a `[B, T, H, M]`-stored output, so that `out.transpose(1, 2).flatten(2)` is a
    view. `torch.empty_like` will not do: for a slice of a fused QKV projection it disagrees between eager and compiled
    code.
    """
    B, H, T, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, T, H, last).transpose(1, 2)
    return like.new_empty(B, H, T, last)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums, row sums and states are fp64 for fp64 inputs and fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_row_sums(q: Tensor) -> Tensor:
    """Allocate the row sums l (or log-sum-exps) `[B, H, T]` of an op."""
    return q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
