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


PEERS: dict[str, Peer] = {"sdpa": Peer("softmax", _load_sdpa)}
