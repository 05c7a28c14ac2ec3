"""The differentiable quadratic-kernel attention that the public functions call."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.op.stateful import Plan, attend
from linattn.kernels.quadratic import ops as ops  # registers the schemas

if TYPE_CHECKING:
    from linattn.kernels.quadratic.contract import Options

# (q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, plan) -> out, state
quadratic = functools.partial(attend, "quadratic")


def row_sums(q: Tensor, k: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options) -> Tensor:
    """The normaliser alone, `[B, H, T]`, from scores."""
    plan = Plan("direct", "reference")
    arguments = (*options, False, False, plan.form, plan.chunk_size, plan.backend)
    return torch.ops.linattn.quadratic_fwd(q, k, k[..., :1], key_mask, cu_seqlens, [], *arguments)[1]
