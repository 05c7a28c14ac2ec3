"""States: the sums over keys that stand in for the keys, so that a sequence can be attended to in pieces.

They are canonical: the same for every backend, and free of scale, coefficients and multiplicities, which are applied
when a query reads them. A state computed in pieces equals the state computed at once; `merge` adds the states of two
pieces of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.errors import StateError, refusal
from linattn.kernels.feature_map.contract import state_shapes as feature_map_shapes
from linattn.kernels.quadratic.contract import state_shapes as quadratic_shapes


class QuadraticState(NamedTuple):
    """Sums over keys for the quadratic kernel; fp32, or fp64 for fp64 inputs.

    Size per head: C M + D^2 + D, C = (D+1)(D+2)/2.

    Attributes:
        n: int64 `[B]`, keys seen (masked keys do not count).
        k_sum: `[B, Hkv, D]`, sum of k.
        kk: `[B, Hkv, D, D]`, sum of k k^T.
        v_sum: `[B, Hkv, M]`, sum of v.
        kv: `[B, Hkv, D, M]`, sum of k v^T.
        kkv: `[B, Hkv, D(D+1)/2, M]`, sum of k_a k_b v for a >= b, at index a(a+1)/2 + b.

    With `cu_seqlens` the leading size is the number of sequences.
    """

    n: Tensor
    k_sum: Tensor
    kk: Tensor
    v_sum: Tensor
    kv: Tensor
    kkv: Tensor

    def merge(self, other: QuadraticState) -> QuadraticState:
        """The state after the keys of both."""
        return QuadraticState(*_added(self, other))

    @staticmethod
    def empty(
        B: int, Hkv: int, D: int, M: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> QuadraticState:
        """The state before any key."""
        n, *sums = quadratic_shapes(B, Hkv, D, M)
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape in sums)
        return QuadraticState(torch.zeros(n, dtype=torch.int64, device=device), *zeros)


class FeatureMapState(NamedTuple):
    """Sums over keys for feature-map attention with C features; fp32, or fp64 for fp64 inputs.

    Size per head: C (M + 1).

    Attributes:
        n: int64 `[B]`, keys seen (masked keys do not count).
        f_sum: `[B, Hkv, C]`, sum of phi(k).
        fv: `[B, Hkv, C, M]`, sum of phi(k) v^T.

    With `cu_seqlens` the leading size is the number of sequences.
    """

    n: Tensor
    f_sum: Tensor
    fv: Tensor

    def merge(self, other: FeatureMapState) -> FeatureMapState:
        """The state after the keys of both."""
        return FeatureMapState(*_added(self, other))

    @staticmethod
    def empty(
        B: int, Hkv: int, C: int, M: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> FeatureMapState:
        """The state before any key."""
        n, *sums = feature_map_shapes(B, Hkv, C, M)
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape in sums)
        return FeatureMapState(torch.zeros(n, dtype=torch.int64, device=device), *zeros)


def _added(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> list[Tensor]:
    if type(a) is not type(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        given = " and ".join(f"{type(state).__name__} {[tuple(x.shape) for x in state]}" for state in (a, b))
        raise refusal(StateError, "merge adds two states", given=given, accepted="two of one kind and shape")
    return [x + y for x, y in zip(a, b, strict=True)]


# So that `torch.load` reads a saved state with its default weights_only=True.
torch.serialization.add_safe_globals([QuadraticState, FeatureMapState])
