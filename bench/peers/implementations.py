"""Implementations that are not ours, by name.

Each says which operation it computes, so that `linattn.bench.peers.verify` can hold it against the truth of that
operation before it is compared with anything, and from which package it comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Peer:
    """`load()` imports what the peer needs and returns `(q, k, v, is_causal) -> out`; `op` is what it computes.

    `package` is what has to be installed; `causal_only` peers have no other mask.
    """

    op: str
    load: Callable[[], Callable[..., Tensor]]
    package: str = "torch"
    causal_only: bool = False


def _load_sdpa() -> Callable[..., Tensor]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return sdpa


def _load_flex() -> Callable[..., Tensor]:
    """Load FlexAttention with the score 2 log|1 + s|, whose softmax is exactly (1 + s)^2 over its sum. Compiled: the
    eager one builds N x N. The clamp keeps log(0) out of it.
    """
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
    """Load one of the kernels behind SDPA and no other: it raises where it cannot run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen, sdpa = getattr(SDPBackend, kind), _load_sdpa()

    def on_one(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(chosen):
            return sdpa(q, k, v, is_causal)

    return on_one


def _causal_only(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Wrap a peer that takes and gives `[B, T, H, D]` and has no other mask than the causal one."""

    def causal(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        if not is_causal:
            raise ArgumentError("this peer is causal only; given: is_causal=False")
        return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return causal


def _load_rebased() -> Callable[..., Tensor]:
    """Load fla-core's (q.k)^2; on [q, 1] and [k, 1] exactly (1 + q.k)^2. D up to 127, padded to a power of 2."""
    from fla.ops.rebased import parallel_rebased

    def one_more(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 1), value=1.0)

    return _causal_only(lambda q, k, v: parallel_rebased(one_more(q), one_more(k), v, use_scale=False))


def _load_fla_linear() -> Callable[..., Tensor]:
    """Load fla-core's linear attention with its normaliser; the feature map is applied before, as its layers do."""
    from fla.ops.linear_attn import chunk_linear_attn

    return _causal_only(
        lambda q, k, v: chunk_linear_attn(_elu_features(q), _elu_features(k), v, scale=1.0, normalize=True)[0]
    )


def _load_fla_plain() -> Callable[..., Tensor]:
    """Load fla-core's linear attention without feature map and normaliser, what its own benchmark times."""
    from fla.ops.linear_attn import chunk_linear_attn

    return _causal_only(lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0])


def _load_retention(chunk: int = 1024) -> Callable[..., Tensor]:
    """Load retention's (q.k)^2 over its sum, no constant and no linear term; chunks as in its own benchmark."""
    from retention import power_retention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = power_retention(*(x.contiguous() for x in (q, k, v)), deg=2, scale=1.0, chunk_size=chunk)
        return out

    return _causal_only(attend)


def _load_lightning() -> Callable[..., Tensor]:
    """Load lightning-attn's q.k without feature map and normaliser, on `[B, H, T, D]`; no decay. Its public function
    fails without decay in 0.0.5, so this is what that would call.
    """
    from lightning_attn.ops.triton import lightning_attn2_no_decay

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        if not is_causal:
            raise ArgumentError("this peer is causal only; given: is_causal=False")
        out: Tensor = lightning_attn2_no_decay(q, k, v)
        return out

    return attend


def _load_naive() -> Callable[..., Tensor]:
    """Load (1 + q.k)^2 as it is written down: all N^2 scores at once."""

    def naive(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        weights = (1 + q @ k.mT).square()
        if is_causal:
            weights = weights.tril()
        return (weights @ v) / weights.sum(dim=-1, keepdim=True)

    return naive


def _load_batched_cumsum(features: Callable[[Tensor], Tensor], chunk: int = 64) -> Callable[..., Tensor]:
    """Load phi(q).phi(k) in plain PyTorch: features of all tokens, states of all chunks, and their cumulated sums."""

    def whole(f_q: Tensor, f_k: Tensor, v: Tensor) -> Tensor:
        return (f_q @ (f_k.mT @ v)) / (f_q @ f_k.sum(dim=-2)[..., None])

    def in_chunks(x: Tensor) -> Tensor:
        B, H, N, size = x.shape
        padded = torch.nn.functional.pad(x, (0, 0, 0, -N % chunk))
        return padded.reshape(B, H, -1, chunk, size)

    def batched_cumsum(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        if not is_causal:
            return whole(features(q), features(k), v)
        # Keys that fill up the last chunk come after every query.
        f_q, f_k, values = in_chunks(features(q)), in_chunks(features(k)), in_chunks(v)
        with_sums = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        states = f_k.mT @ with_sums
        before = states.cumsum(dim=2) - states
        inside = (f_q @ f_k.mT).tril() @ with_sums
        sums = (f_q @ before + inside).flatten(2, 3)[:, :, : q.shape[2]]
        return sums[..., :-1] / sums[..., -1:]

    return batched_cumsum


def _elu_features(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def _quadratic_features(x: Tensor) -> Tensor:
    """Return [1, sqrt(2) x_i, x_i^2, sqrt(2) x_i x_j (i < j)], every one of them in memory."""
    D = x.shape[-1]
    i, j = torch.triu_indices(D, D, device=x.device)
    weight = torch.where(i == j, 1.0, 2**0.5).to(x)
    return torch.cat([torch.ones_like(x[..., :1]), 2**0.5 * x, x[..., i] * x[..., j] * weight], dim=-1)


PEERS: dict[str, Peer] = {
    "sdpa": Peer("softmax", _load_sdpa),
    "sdpa-flash": Peer("softmax", lambda: _load_sdpa_on("FLASH_ATTENTION")),
    "sdpa-efficient": Peer("softmax", lambda: _load_sdpa_on("EFFICIENT_ATTENTION")),
    "sdpa-cudnn": Peer("softmax", lambda: _load_sdpa_on("CUDNN_ATTENTION")),
    "sdpa-math": Peer("softmax", lambda: _load_sdpa_on("MATH")),
    "flex": Peer("quadratic", _load_flex),
    "naive": Peer("quadratic", _load_naive),
    "features-cumsum": Peer("quadratic", lambda: _load_batched_cumsum(_quadratic_features)),
    "fla-rebased": Peer("quadratic", _load_rebased, "fla-core", causal_only=True),
    "retention": Peer("power", _load_retention, "retention", causal_only=True),
    "elu-cumsum": Peer("elu+1", lambda: _load_batched_cumsum(_elu_features)),
    "fla-linear": Peer("elu+1", _load_fla_linear, "fla-core", causal_only=True),
    "fla-plain": Peer("plain", _load_fla_plain, "fla-core", causal_only=True),
    "lightning": Peer("plain", _load_lightning, "lightning-attn", causal_only=True),
}
