"""Sums over keys that stand in for the keys themselves, and the gradients that flow through them."""

from __future__ import annotations

import abc
import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.reference.features import features_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linattn.kernels.common.reference.problem import Problem


class Sums(abc.ABC):
    """The layout that sums over keys and the gradients to them share.

    S `[batch, F, M]` belongs to phi(k) v^T, k_sum to k and kk to k k^T. Canonical sums are the tensors of a state
    without n: k_sum, kk, v_sum, kv, kkv, or f_sum, fv.
    """

    def __init__(self, problem: Problem, canonical: Sequence[Tensor]) -> None:
        self.problem = problem
        self.features = features_for(problem.D, problem.degree)
        self.weights = self.features.weights(problem.coefficients, problem.zeros(0))
        self.any = bool(canonical)  # whether there is anything in them
        H, D, M = problem.batch, problem.D, problem.M
        self.k_sum = canonical[0].reshape(H, D).clone() if canonical else problem.zeros(H, D)
        if problem.degree == 2:
            self.kk = canonical[1].reshape(H, D, D).clone() if canonical else problem.zeros(H, D, D)
        if not canonical:
            return
        if problem.degree == 1:
            self.S.copy_(canonical[1].reshape(H, D, M))
        else:
            self.S[:, 0] = canonical[2].reshape(H, M)
            self.S[:, self.features.linear] = canonical[3].reshape(H, D, M)
            self._set_products(canonical[4].reshape(H, -1, M))

    @functools.cached_property
    def S(self) -> Tensor:  # noqa: N802 (the formula's letter)
        """Make the sums at first use: the direct form without states never needs it."""
        return self.problem.zeros(self.problem.batch, self.features.size, self.problem.M)

    def canonical_sums(self) -> list[Tensor]:
        """Copies of the canonical sums."""
        B, Hkv = self.problem.k.shape[:2]
        sums = [self.k_sum, self.S]
        if self.problem.degree == 2:
            sums = [self.k_sum, self.kk, self.S[:, 0], self.S[:, self.features.linear], self._products()]
        return [x.reshape(B, Hkv, *x.shape[1:]).clone() for x in sums]

    @abc.abstractmethod
    def _set_products(self, canonical: Tensor) -> None:
        """Fill the products in S from canonical ones `[batch, D(D+1)/2, M]`."""

    @abc.abstractmethod
    def _products(self) -> Tensor:
        """The products in S as canonical ones."""


class KeySums(Sums):
    """Hold what every query needs to know of the keys seen so far.

    The row sum needs no feature map: it comes from n `[B]`, k_sum and kk.
    """

    def __init__(self, problem: Problem, state: Sequence[Tensor] = ()) -> None:
        """Start from a canonical state, n first, or from no keys."""
        super().__init__(problem, state[1:])
        self.n = state[0].clone() if state else problem.k.new_zeros(problem.k.shape[0], dtype=torch.int64)

    def canonical(self) -> list[Tensor]:
        """The state that every backend shares, n first."""
        return [self.n.clone(), *self.canonical_sums()]

    def _set_products(self, canonical: Tensor) -> None:
        self.features.unpack(canonical, self.S)

    def _products(self) -> Tensor:
        return self.features.pack(self.S)

    def add(self, j0: int, j1: int) -> None:
        """Fold keys j0..j1 in."""
        k, v = self.problem.keys(j0, j1), self.problem.values(j0, j1)
        self.S.baddbmm_(self.features(k), v)
        self.k_sum += k.sum(1)
        if self.problem.degree == 2:
            self.kk.baddbmm_(k.mT, k)
        self.n += self.problem.count(j0, j1)
        self.any = True

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the keys seen so far contribute to queries x: sum of p v and sum of p."""
        acc = self.features(x).mT @ (self.S * self.weights)
        c0, c1, c2 = self.problem.coefficients
        l = c1 * (x @ self.k_sum[..., None]).squeeze(-1)
        if self.problem.degree == 2:
            l += c2 * ((x @ self.kk) * x).sum(-1)
            l += c0 * self.n.to(l.dtype).repeat_interleave(self.problem.k.shape[1])[:, None]
        return acc, l

    def query_gradient(self, x: Tensor, do: Tensor, delta: Tensor) -> Tensor:
        """The gradient to x of sum(do * acc) - sum(delta * l), with acc, l = read(x)."""
        c1, c2 = self.problem.coefficients[1:]
        dx = self.features.pullback((self.S * self.weights) @ do.mT, x)
        dl = c1 * self.k_sum[:, None]
        if self.problem.degree == 2:
            dl = dl + c2 * (x @ (self.kk + self.kk.mT))
        return dx - delta[..., None] * dl


class KeySumGradients(Sums):
    """Gradients to the sums over keys: gathered from rows that read them, handed on to the keys folded in before.

    Start from gradients to a returned canonical state (without n), or from none.
    """

    def __init__(self, problem: Problem, canonical: Sequence[Tensor] = ()) -> None:
        super().__init__(problem, canonical)

    def _set_products(self, canonical: Tensor) -> None:
        self.features.pack_adjoint(canonical, self.S)

    def _products(self) -> Tensor:
        return self.features.unpack_adjoint(self.S)

    def add(self, x: Tensor, do: Tensor, delta: Tensor) -> None:
        """Rows x read the sums: what `KeySums.query_gradient` is to x, this is to the sums."""
        c1, c2 = self.problem.coefficients[1:]
        self.S.addcmul_(self.features(x) @ do, self.weights)
        dl = delta[..., None] * x
        self.k_sum.sub_(c1 * dl.sum(1))
        if self.problem.degree == 2:
            self.kk.baddbmm_(dl.mT, x, alpha=-c2)
        self.any = True

    def merge(self, other: KeySumGradients) -> None:
        """Add what other rows made of the same sums."""
        self.S += other.S
        self.k_sum += other.k_sum
        if self.problem.degree == 2:
            self.kk += other.kk

    def key_gradient(self, j0: int, j1: int) -> tuple[Tensor, Tensor]:
        """Gradients to keys and values j0..j1, which `KeySums.add` folded in."""
        k, v = self.problem.keys(j0, j1), self.problem.values(j0, j1)
        dv = self.features(k).mT @ self.S
        dk = self.features.pullback(self.S @ v.mT, k) + self.k_sum[:, None]
        if self.problem.degree == 2:
            dk = dk + k @ (self.kk + self.kk.mT)
        return self.problem.kept(dk, j0, j1), self.problem.kept(dv, j0, j1)
