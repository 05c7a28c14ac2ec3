"""Attention for any similarity (Eq. 6) and its lookup limit, in plain differentiable PyTorch.

Score tiles are recomputed in the backward pass by checkpointing, so memory is O(N (D + M)) and one tile, and
parameters inside `sim` get gradients, of any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linattn.errors import ArgumentError, ShapeError
from linattn.kernels.common.op.registration import full_precision
from linattn.kernels.common.reference.tiles import Tiles, spans

Similarity = Callable[[Tensor, Tensor], Tensor]


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, sim: Similarity, is_causal: bool) -> Tensor:
    """sum_j sim(q_i, k_j) v_j / sum_j sim(q_i, k_j), a tile at a time."""
    tiles = Tiles(q, k, v, None, is_causal, 0, 1.0)
    length = tiles.tile_length()
    rows = []
    for i0, i1 in spans(0, tiles.Tq, length):
        sums: list[Tensor] = []
        for j0, j1 in spans(0, tiles.visible_keys(i1), length):
            hidden = tiles.hidden(i0, i1, j0, j1)
            keys = (k[:, :, j0:j1], v[:, :, j0:j1])
            more = checkpoint(_tile, sim, q[:, :, i0:i1], *keys, hidden, use_reentrant=False)
            sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else list(more)
        acc, l = sums
        empty = l <= 0
        rows.append((acc / l.masked_fill(empty, 1)[..., None]).masked_fill(empty[..., None], 0).to(v.dtype))
    return torch.cat(rows, 2)


def _tile(sim: Similarity, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    p = sim(q, k)
    expected = (*q.shape[:-1], k.shape[2])
    if not isinstance(p, Tensor) or p.shape != expected:
        given = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
        raise ShapeError(
            f"sim(q, k) must return a tensor {expected} for q {tuple(q.shape)}, k {tuple(k.shape)}; given: {given}"
        )
    if hidden is not None:
        p = p.masked_fill(hidden, 0)
    _check_non_negative(p)
    accumulate = torch.promote_types(p.dtype, torch.float32)
    p = p.to(accumulate)
    with full_precision(p.device.type):
        return p @ v.to(accumulate), p.sum(-1)


def _check_non_negative(p: Tensor) -> None:
    """The values are data: an error on CPU, an asynchronous assertion on CUDA, nothing while a graph is traced."""
    if torch.compiler.is_compiling():
        return
    negative = (p.detach() < 0).any()
    if p.device.type == "cpu" and negative:
        raise ArgumentError(f"sim must be non-negative; given: a value of {p.min().item():.3g}")
    if p.device.type == "cuda":
        torch._assert_async(~negative, "linattn.kernel_attention: sim must be non-negative")


class Argmax(torch.autograd.Function):
    """out_i = v_j with j = argmax_j q_i.k_j (the first of equals). The gradient to q, k is zero wherever it exists."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values and the keys' positions."""
        with full_precision(q.device.type):  # rounded scores tie where exact ones do not
            index = Argmax.best_keys(q, k, v)
        return v.gather(2, index[..., None].expand(*index.shape, v.shape[3])), index

    @staticmethod
    def best_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the position of each query's best key, `[B, H, Tq]`."""
        tiles = Tiles(q, k, v, None, False, 0, 1.0)
        length = tiles.tile_length()
        index = torch.empty(q.shape[:3], dtype=torch.int64, device=q.device)
        for i0, i1 in spans(0, tiles.Tq, length):
            x = tiles.queries(i0, i1)
            best = torch.full_like(x[..., 0], -torch.inf)
            winner = torch.zeros_like(best, dtype=torch.int64)
            for j0, j1 in spans(0, tiles.Tk, length):
                score, j = (x @ tiles.keys(j0, j1).mT).max(-1)
                winner = torch.where(score > best, j + j0, winner)
                best = torch.maximum(best, score)
            index[:, :, i0:i1] = tiles.unfold(winner)
        return index

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the positions for the gradient to the values."""
        q, k, v = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, output[1])
        ctx.value_shape = v.shape

    @staticmethod
    def backward(ctx: Any, dout: Any, dindex: Any) -> Any:
        """Return zeros for q and k, and the sum of what each value was looked up for."""
        q, k, index = ctx.saved_tensors
        expanded = index[..., None].expand(*index.shape, dout.shape[3])
        dv = dout.new_zeros(ctx.value_shape).scatter_add(2, expanded, dout)
        return torch.zeros_like(q), torch.zeros_like(k), dv
