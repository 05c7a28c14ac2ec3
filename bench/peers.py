"""Implementations that are not ours, by name. Each says which operation it computes, so its error can be judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """`load()` imports what the peer needs and returns `(q, k, v, is_causal) -> out`; `op` is what it computes."""

    op: str
    load: Callable[[], Callable[..., Tensor]]


def _load_sdpa() -> Callable[..., Tensor]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return sdpa


def _load_flex() -> Callable[..., Tensor]:
    """FlexAttention with the score 2 log|1 + s|, whose softmax is exactly (1 + s)^2 over its sum. Compiled: the eager
    one builds N x N. The clamp keeps log(0) out of it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[tuple[int, torch.device], object] = {}

    def log_square(score: Tensor, *position: Tensor) -> Tensor:
        return 2 * torch.log((1 + score).abs().clamp(min=1e-20))

    def flex(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        key = (q.shape[2], q.device)
        if is_causal and key not in masks:
            sizes = (None, None, q.shape[2], q.shape[2])
            masks[key] = create_block_mask(lambda b, h, i, j: i >= j, *sizes, device=q.device)
        mask = masks[key] if is_causal else None
        out: Tensor = compiled(q, k, v, score_mod=log_square, block_mask=mask, scale=1.0)
        return out

    return flex


PEERS: dict[str, Peer] = {"sdpa": Peer("softmax", _load_sdpa), "flex": Peer("quadratic", _load_flex)}
