"""The feature map phi of a polynomial similarity, in the padded block layout that plain PyTorch computes fastest."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

BLOCK = 8


class Features:
    """phi(x) = [1, x, x_i x_j], or just [x] at degree 1; tiles are feature-major `[batch, F, rows]`.

    Products come in row blocks: the 8 rows i of block a against all j < 8 (a + 1). Each block is one outer product
    whose inner loop runs along the rows of the tile. Pairs inside a diagonal block appear twice (as ij and ji) with
    weight 1, the others once with weight 2, so F exceeds the exact count C by a factor of only (D + 8)/(D + 1). The
    weights, 1, c1 and c2 belong to the query side (`weights`), so that sums over keys stay free of them.
    """

    def __init__(self, D: int, degree: int) -> None:
        self.D, self.degree = D, degree
        self.linear = slice(0, D) if degree == 1 else slice(1, 1 + D)
        self.blocks: list[tuple[slice, slice, int]] = []  # (features, rows i, number of columns j)
        self.size = self.linear.stop
        for i0 in range(0, D if degree == 2 else 0, BLOCK):
            i1 = min(i0 + BLOCK, D)
            self.blocks.append((slice(self.size, self.size + (i1 - i0) * i1), slice(i0, i1), i1))
            self.size += (i1 - i0) * i1

    def __call__(self, x: Tensor) -> Tensor:
        """`[batch, rows, D]` -> `[batch, F, rows]`."""
        x = x.mT
        if self.degree == 1:
            return x
        x = x.contiguous()
        phi = x.new_empty(x.shape[0], self.size, x.shape[2])
        phi[:, 0] = 1
        phi[:, self.linear] = x
        for features, rows, columns in self.blocks:
            block = phi[:, features].unflatten(1, (-1, columns))
            torch.mul(x[:, rows, None], x[:, None, :columns], out=block)
        return phi

    def pullback(self, dphi: Tensor, x: Tensor) -> Tensor:
        """The gradient to x `[batch, rows, D]` of sum(dphi * phi(x)), for dphi `[batch, F, rows]`."""
        if self.degree == 1:
            return dphi.mT
        x = x.mT.contiguous()
        dx = dphi[:, self.linear].clone()
        for features, rows, columns in self.blocks:
            block = dphi[:, features].unflatten(1, (-1, columns))
            dx[:, rows] += (block * x[:, None, :columns]).sum(2)
            dx[:, :columns] += (block * x[:, rows, None]).sum(1)
        return dx.mT

    def weights(self, coefficients: tuple[float, float, float], like: Tensor) -> Tensor:
        """`[F, 1]`: what each feature counts for in p(s) = sum_f w_f phi_f(x) phi_f(k)."""
        c0, c1, c2 = coefficients
        w = like.new_full((self.size, 1), c1)
        if self.degree == 2:
            w[0] = c0
            for features, rows, columns in self.blocks:
                w[features] = 2 * c2
                w[features].view(-1, columns)[:, rows] = c2  # the diagonal block holds ij and ji
        return w

    def pack(self, padded: Tensor) -> Tensor:
        """Products of a block-layout sum `[batch, F, M]` in the canonical order a(a+1)/2 + b, a >= b."""
        return padded.index_select(1, _canonical_to_block(self.D, padded.device))

    def pack_adjoint(self, dcanonical: Tensor, dpadded: Tensor) -> None:
        """Add to dpadded what a gradient to `pack(padded)` gives to padded."""
        dpadded.index_add_(1, _canonical_to_block(self.D, dpadded.device), dcanonical)

    def unpack(self, canonical: Tensor, padded: Tensor) -> None:
        """Write canonical sums into the products of a block layout; the inverse of `pack` on sums over keys."""
        padded[:, self.linear.stop :] = canonical.index_select(1, _block_to_canonical(self.D, padded.device))

    def unpack_adjoint(self, dpadded: Tensor) -> Tensor:
        """Return what a gradient to the padded products gives to canonical sums."""
        index = _block_to_canonical(self.D, dpadded.device)
        dcanonical = dpadded.new_zeros(dpadded.shape[0], self.D * (self.D + 1) // 2, dpadded.shape[2])
        return dcanonical.index_add_(1, index, dpadded[:, self.linear.stop :])


@functools.lru_cache(maxsize=64)
def features_for(D: int, degree: int) -> Features:
    """Return the map for a head size and degree, made once."""
    return Features(D, degree)


@functools.lru_cache(maxsize=64)
def _block_to_canonical(D: int, device: torch.device) -> Tensor:
    pairs = []
    for _, rows, columns in features_for(D, 2).blocks:
        i = torch.arange(rows.start, rows.stop)[:, None].expand(-1, columns)
        j = torch.arange(columns)[None, :].expand(rows.stop - rows.start, -1)
        a, b = torch.maximum(i, j), torch.minimum(i, j)
        pairs.append((a * (a + 1) // 2 + b).flatten())
    return torch.cat(pairs).to(device)


@functools.lru_cache(maxsize=64)
def _canonical_to_block(D: int, device: torch.device) -> Tensor:
    position = torch.empty(D, D, dtype=torch.int64)
    for features, rows, columns in features_for(D, 2).blocks:
        position[rows, :columns] = torch.arange(features.start, features.stop).view(-1, columns)
    a, b = torch.tril_indices(D, D)
    return position[a, b].to(device)
