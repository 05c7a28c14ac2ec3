"""Define what every backend of the softmax ops agrees on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class ForwardInputs(NamedTuple):
    """Hold what every backend's `forward` takes, in the order of `softmax_fwd`.

    Attributes:
        q, k, v: `[B, H, T, D]`, `[B, Hkv, Tk, D]`, `[B, Hkv, Tk, M]`, of any strides.
        key_mask: bool `[B, Tk]`, True for keys that count.
        cu_seqlens: `[S + 1]`, bounds of packed sequences; a backend checks their values.
        is_causal: query i sees keys up to i + q_offset.
        q_offset: see there.
        scale: factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    is_causal: bool
    q_offset: int
    scale: float


class BackwardInputs(NamedTuple):
    """Hold what every backend's `backward` takes, in the order of `softmax_bwd`.

    Attributes:
        dout: the gradient of out.
        out, lse: what `forward` returned; lse is the log-sum-exp of each query's scores.
        q, k, v, key_mask, cu_seqlens, is_causal, q_offset, scale: see `ForwardInputs`.
    """

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    is_causal: bool
    q_offset: int
    scale: float


class Implementation(Protocol):
    """A backend: a module of these functions, and `describe(q, k, v, is_causal, form) -> str` if its kernels depend on
    the call.
    """

    def forward(self, inputs: ForwardInputs, /) -> tuple[Tensor, Tensor]:
        """Compute out and lse `[B, H, T]`, -inf for a query that sees no key."""

    def backward(self, inputs: BackwardInputs, /) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk, dv."""
