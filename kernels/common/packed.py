"""Packed sequences: several sequences laid end to end in one row, delimited by `cu_seqlens`."""

from __future__ import annotations

import itertools

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
