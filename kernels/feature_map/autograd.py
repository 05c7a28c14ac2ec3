"""The differentiable feature-map attention that the public functions call."""

from __future__ import annotations

from torch import Tensor

from ..common.autograd import attend
from . import ops as ops  # registers the schemas


def feature_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: tuple[Tensor, ...],
    is_causal: bool,
    q_offset: int,
    scale: float,
    feature_map: str,
    normalize: bool,
    return_state: bool,
    form: str,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    options = (is_causal, q_offset, scale, feature_map, normalize)
    return attend(
        "feature_map", q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, form, chunk_size, backend
    )
