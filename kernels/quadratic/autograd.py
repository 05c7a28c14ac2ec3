"""The differentiable quadratic-kernel attention that the public functions call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.autograd import attend
from . import ops as ops  # registers the schemas


def quadratic(
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
    coefficients: tuple[float, float, float],
    normalize: bool,
    return_state: bool,
    form: str,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    options = (is_causal, q_offset, scale, *coefficients, normalize)
    return attend(
        "quadratic", q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, form, chunk_size, backend
    )


def row_sums(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    is_causal: bool,
    q_offset: int,
    scale: float,
    coefficients: tuple[float, float, float],
) -> Tensor:
    """The normaliser alone, `[B, H, T]`, from scores."""
    options = (is_causal, q_offset, scale, *coefficients, False)
    return torch.ops.linattn.quadratic_fwd(
        q, k, k[..., :1], key_mask, cu_seqlens, [], *options, False, "direct", 0, "reference"
    )[1]
