"""Packed sequences: several sequences laid end to end in one row, delimited by `cu_seqlens`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from linattn.errors import ArgumentError


def sequence_bounds(cu_seqlens: Tensor, T: int) -> list[tuple[int, int]]:
    """Read `cu_seqlens` as `[(start, end), ...]`; raise if its values do not partition `[0, T)`.

    The values are data, so this check runs inside the op, before any kernel: it is the one check that a traced graph
    cannot do.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != T:
        raise ArgumentError(f"cu_seqlens must start at 0 and end at T={T}; given: first {ends[0]}, last {ends[-1]}")
    bounds = list(itertools.pairwise(ends))
    for i, (start, end) in enumerate(bounds):
        if end < start:
            raise ArgumentError(f"cu_seqlens must not decrease; given: {start} at [{i}], then {end} at [{i + 1}]")
    return bounds


def check_sequences(cu_seqlens: Tensor, T: int) -> None:
    """Raise if the values of `cu_seqlens` do not partition `[0, T)`. On a GPU the check runs there, and an error comes
    when its result is next waited for: reading the values here would stall every call.
    """
    if cu_seqlens.device.type == "cpu":
        sequence_bounds(cu_seqlens, T)
    elif cu_seqlens.device.type != "meta":
        right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
        torch._assert_async(right, f"cu_seqlens must start at 0, not decrease, and end at T={T}")
