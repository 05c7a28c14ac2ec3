"""Define what every backend of the feature-map ops agrees on: options and state."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """sim = scale * phi(q).phi(k); q and k come unmapped, or as features if feature_map is "identity"."""

    is_causal: bool
    q_offset: int
    scale: float
    feature_map: str
    normalize: bool


SCHEMA = "bool is_causal, SymInt q_offset, float scale, str feature_map, bool normalize"


STATE_TENSORS = 3


def state_shapes(sequences: int, Hkv: int, C: int, M: int) -> list[tuple[int, ...]]:
    """Return the shapes of n, f_sum, fv."""
    return [(sequences,), (sequences, Hkv, C), (sequences, Hkv, C, M)]
