"""Implementations that are not ours, by name. Each says which operation it computes, so its error can be judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linattn.errors import ArgumentError


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

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[tuple[int, torch.device], Any] = {}

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


def _load_sdpa_on(kind: str) -> Callable[..., Tensor]:
    """One of the kernels behind SDPA and no other: it raises where it cannot run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen, sdpa = getattr(SDPBackend, kind), _load_sdpa()

    def on_one(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(chosen):
            return sdpa(q, k, v, is_causal)

    return on_one


def _causal_only(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A peer that takes and gives `[B, T, H, D]` and has no other mask than the causal one."""

    def causal(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        if not is_causal:
            raise ArgumentError("this peer is causal only; given: is_causal=False")
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return causal


def _load_rebased() -> Callable[..., Tensor]:
    """fla-core: (q.k)^2 directly; on [q, 1] and [k, 1] exactly (1 + q.k)^2. D up to 127, padded to a power of 2."""
    from fla.ops.rebased import parallel_rebased

    def one_more(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1), value=1.0)

    return _causal_only(lambda q, k, v: parallel_rebased(one_more(q), one_more(k), v, use_scale=False))


def _load_fla_linear() -> Callable[..., Tensor]:
    """fla-core: linear attention with its normaliser; the feature map is applied before, as its layers do."""
    from fla.ops.linear_attn import chunk_linear_attn

    def mapped(x: Tensor) -> Tensor:
        return torch.nn.functional.elu(x) + 1

    return _causal_only(lambda q, k, v: chunk_linear_attn(mapped(q), mapped(k), v, scale=1.0, normalize=True)[0])


def _load_fla_plain() -> Callable[..., Tensor]:
    """fla-core: linear attention without feature map and normaliser, what its own benchmark times."""
    from fla.ops.linear_attn import chunk_linear_attn

    return _causal_only(lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0])


def _load_retention(chunk: int = 1024) -> Callable[..., Tensor]:
    """retention: (q.k)^2 over its sum, no constant and no linear term; chunks as in its own benchmark."""
    from retention import power_retention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = power_retention(*(x.contiguous() for x in (q, k, v)), deg=2, scale=1.0, chunk_size=chunk)
        return out

    return _causal_only(attend)


def _load_lightning() -> Callable[..., Tensor]:
    """lightning-attn: q.k without feature map and normaliser, on `[B, H, T, D]`; no decay. Its public function fails
    without decay in 0.0.5, so this is what that would call."""
    from lightning_attn.ops.triton import lightning_attn2_no_decay

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        if not is_causal:
            raise ArgumentError("this peer is causal only; given: is_causal=False")
        out: Tensor = lightning_attn2_no_decay(q, k, v)
        return out

    return attend


PEERS: dict[str, Peer] = {
    "sdpa": Peer("softmax", _load_sdpa),
    "sdpa-flash": Peer("softmax", lambda: _load_sdpa_on("FLASH_ATTENTION")),
    "sdpa-cudnn": Peer("softmax", lambda: _load_sdpa_on("CUDNN_ATTENTION")),
    "sdpa-math": Peer("softmax", lambda: _load_sdpa_on("MATH")),
    "flex": Peer("quadratic", _load_flex),
    "fla-rebased": Peer("quadratic", _load_rebased),
    "fla-linear": Peer("elu+1", _load_fla_linear),
    "fla-plain": Peer("plain", _load_fla_plain),
    "retention": Peer("power", _load_retention),
    "lightning": Peer("plain", _load_lightning),
}
