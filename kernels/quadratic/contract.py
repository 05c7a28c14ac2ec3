"""Define what every backend of the quadratic-kernel ops agrees on: options and state."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """sim = c0 + c1 s + c2 s^2 with s = scale * q.k; query i sees keys up to i + q_offset if is_causal."""

    is_causal: bool
    q_offset: int
    scale: float
    c0: float
    c1: float
    c2: float
    normalize: bool


SCHEMA = "bool is_causal, SymInt q_offset, float scale, float c0, float c1, float c2, bool normalize"


STATE_TENSORS = 6


def state_shapes(sequences: int, Hkv: int, D: int, M: int) -> list[tuple[int, ...]]:
    """Return the shapes of n, k_sum, kk, v_sum, kv, kkv."""
    sizes: list[tuple[int, ...]] = [(D,), (D, D), (M,), (D, M), (D * (D + 1) // 2, M)]
    return [(sequences,)] + [(sequences, Hkv, *size) for size in sizes]
