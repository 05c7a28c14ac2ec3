"""Ops with a first derivative only say so when somebody asks for the second."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from linattn.errors import DoubleBackwardError


def needs_autograd(*tensors: Tensor) -> bool:
    """Return whether a call has to go through an autograd.Function. If not, the op itself is called, which costs less.

    In forward mode it has to as well: the Function refuses there, where the op would silently lose the tangent.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def distinct(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same tensors as separate objects: a compiled autograd.Function refuses one tensor given twice."""
    if torch.compiler.is_compiling():
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is q or v is k else v
    return q, k, v


ALL_DERIVATIVES = "linattn.kernel_attention, with sim=lambda q, k: (1 + q @ k.mT) ** 2 for example, has all of them"


def first_derivative_only(
    op: str, gradients: tuple[Tensor, ...], of: tuple[Tensor, ...], instead: str = ALL_DERIVATIVES
) -> tuple[Tensor, ...]:
    """Make a second backward pass through `gradients` raise, instead of silently returning nothing.

    `instead` tells what has a second derivative.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return FirstDerivativeOnly.apply(op, instead, len(gradients), *gradients, *of)
    return gradients


class FirstDerivativeOnly(torch.autograd.Function):
    """The identity on gradients, whose own backward pass raises DoubleBackwardError."""

    @staticmethod
    def forward(op: Any, instead: Any, count: Any, *tensors: Any) -> Any:
        """Return the gradients, the first `count` of the tensors."""
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the message needs."""
        ctx.op, ctx.instead, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Raise: there is no second derivative."""
        raise DoubleBackwardError(
            f"{ctx.op} has a first derivative only; given: a backward pass through its gradients. {ctx.instead}."
        )
