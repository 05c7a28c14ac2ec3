"""Define a measurement: a problem (the inputs), a method (who computes it), and the call the two make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

import linattn
from linattn.bench.peers.implementations import PEERS
from linattn.errors import ArgumentError, unknown_name
from linattn.testing import make_inputs

if TYPE_CHECKING:
    from linattn.cost import Form

Direction = Literal["forward", "training"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "training")
Call = Callable[[], tuple[Tensor, ...]]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
FEATURE_MAP_OPS = ("elu+1", "relu", "relu2", "exp")
COEFFICIENTS = {"quadratic": (1, 2, 1), "taylor": (1, 1, 0.5), "power": (0, 0, 1)}
GENERAL = "general"
"""Backend name of the operations in plain PyTorch that have no other."""


@dataclass(frozen=True)
class Problem:
    """The inputs of one comparison; everything that all methods share.

    `direction` is "forward", or "training" for forward and backward together.
    """

    N: int
    D: int
    M: int
    B: int = 1
    H: int = 4
    dtype: str = "fp32"
    is_causal: bool = False
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if min(self.N, self.D, self.M, self.B, self.H) < 1:
            sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("N", "D", "M", "B", "H"))
            raise ArgumentError(f"sizes got {sizes}; accepted: integers of at least 1")

    def __str__(self) -> str:
        causal = "causal" if self.is_causal else "non-causal"
        return f"D{self.D}-N{self.N}-{causal}-{self.dtype}-{self.direction}-B{self.B}H{self.H}"

    def inputs(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return random q, k, v on which every kernel is well conditioned, drawn the same on every device."""
        return make_inputs(
            batch=self.B,
            heads=self.H,
            keys=self.N,
            head_size=self.D,
            value_size=self.M,
            dtype=DTYPES[self.dtype],
            device=device,
            seed=seed,
        )


@dataclass(frozen=True)
class Method:
    """Who computes it: an operation, the form it takes, and a backend of linattn or the name of a peer.

    `op` is "softmax", "quadratic", "taylor" (1 + s + s^2/2), "power" ((q.k)^2), "plain" (q.k, not divided by its sum),
    "argmax" or a feature map's name.
    """

    name: str
    op: str
    form: Form
    backend: str = "auto"

    @property
    def kernel(self) -> Literal["softmax", "quadratic", "feature_map"]:
        """The family that `linattn.cost` counts it under."""
        return (
            "softmax" if self.op in ("softmax", "argmax") else "quadratic" if self.op in COEFFICIENTS else "feature_map"
        )


SDPA = Method("SDPA", "softmax", "direct", "sdpa")
QUADRATIC_DIRECT = Method("quadratic direct", "quadratic", "direct")
QUADRATIC_CHUNKED = Method("quadratic chunked", "quadratic", "chunked")
SOFTMAX = Method("softmax", "softmax", "direct")
ELU_CHUNKED = Method("elu+1 chunked", "elu+1", "chunked")
KERNEL_ATTENTION = Method("kernel_attention", "quadratic", "direct", GENERAL)
ARGMAX = Method("argmax_attention", "argmax", "direct", GENERAL)


def supports(method: Method, problem: Problem) -> bool:
    """Say whether a method is defined on a problem: decoding goes forwards in time, looking up the best key has no mask
    and no gradient to queries and keys.
    """
    if method.form == "recurrent":
        return problem.is_causal
    return method.op != "argmax" or (problem.direction == "forward" and not problem.is_causal)


def attention_of(method: Method) -> Callable[..., Tensor]:
    """Return the function `(q, k, v, is_causal) -> out` that a method stands for."""
    if method.backend in PEERS:
        peer = PEERS[method.backend]
        if peer.op != method.op:
            raise ArgumentError(f"peer {method.backend!r} computes {peer.op!r}, got op {method.op!r}")
        return peer.load()
    if method.backend == GENERAL:
        return _general(method)
    if method.op == "softmax":
        return lambda q, k, v, is_causal: linattn.softmax_attention(
            q, k, v, is_causal=is_causal, backend=method.backend
        )
    if method.op in COEFFICIENTS:
        return lambda q, k, v, is_causal: linattn.quadratic_attention(
            q, k, v, coefficients=COEFFICIENTS[method.op], is_causal=is_causal, form=method.form, backend=method.backend
        )
    if method.op == "plain":
        return lambda q, k, v, is_causal: linattn.linear_attention(
            q, k, v, feature_map="identity", normalize=False, is_causal=is_causal, form=method.form,
            backend=method.backend,
        )  # fmt: skip
    if method.op in FEATURE_MAP_OPS:
        return lambda q, k, v, is_causal: linattn.linear_attention(
            q, k, v, feature_map=method.op, is_causal=is_causal, form=method.form, backend=method.backend
        )
    raise unknown_name("op", method.op, ("softmax", *COEFFICIENTS, "plain", *FEATURE_MAP_OPS))


def _general(method: Method) -> Callable[..., Tensor]:
    if method.op == "argmax":
        return lambda q, k, v, is_causal: linattn.argmax_attention(q, k, v)
    if method.op in COEFFICIENTS:
        c0, c1, c2 = COEFFICIENTS[method.op]

        def similarity(q: Tensor, k: Tensor) -> Tensor:
            s = q @ k.mT
            return c0 + c1 * s + c2 * s.square()

        return lambda q, k, v, is_causal: linattn.kernel_attention(q, k, v, sim=similarity, is_causal=is_causal)
    raise unknown_name("op", method.op, ("argmax", *COEFFICIENTS))


def prepare(method: Method, problem: Problem, tensors: Sequence[Tensor], upstream: Tensor | None = None) -> Call:
    """Return the call to be timed: returns (out,) or, for training, (out, dq, dk, dv).

    Gradients are returned, not accumulated, so nothing has to be cleared between repeats.
    """
    attention = attention_of(method)
    if problem.direction == "forward":
        q, k, v = tensors

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attention(q, k, v, problem.is_causal),)

        return forward

    leaves = tuple(t.detach().requires_grad_() for t in tensors)

    def training() -> tuple[Tensor, ...]:
        out = attention(*leaves, problem.is_causal)
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    return training


def backend_used(method: Method, problem: Problem, tensors: Sequence[Tensor]) -> str:
    """Return the backend that runs: what "auto" resolves to on these inputs, else the one that was named."""
    if method.backend != "auto":
        return method.backend
    q, k, v = tensors
    options = {} if method.op == "softmax" else {"form": method.form}
    return str(linattn.explain(q, k, v, kernel=method.op, is_causal=problem.is_causal, **options).backend)
