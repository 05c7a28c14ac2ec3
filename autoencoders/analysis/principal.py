"""Principal components, and what they have to do with a linear autoencoder L = |X - W2 W1 X|^2 / n.

Here samples are rows: X is `[n, F]`, centred, W1 `[k, F]`, W2 `[F, k]`, and S = X^T X / n. L is stationary where

    (I - W2 W1) S W1^T = 0        W2^T (I - W2 W1) S = 0

and smallest, sum of the eigenvalues of S after the k-th, where W2 W1 projects onto the k principal directions. W1 and
W2 themselves are free up to an invertible k x k matrix, so a trained autoencoder finds the subspace, not the
directions; weight decay lambda (|W1|^2 + |W2|^2) takes most of that freedom away: then W1 = W2^T, with singular values
sqrt(max(0, 1 - lambda / sigma_i^2)), sigma_i^2 the eigenvalues of S.

Source: Baldi and Hornik 1989, "Neural networks and principal component analysis"; Kunin et al. 2019, "Loss landscapes
of regularized linear autoencoders".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from linattn.errors import ArgumentError, ShapeError, refusal


class Components(NamedTuple):
    """Mean `[F]`, directions `[F, k]` with orthonormal columns, all F variances in falling order; float64."""

    mean: Tensor
    directions: Tensor
    variances: Tensor


def principal_components(x: Tensor, k: int) -> Components:
    """Find the k directions of largest variance of samples x `[n, F]`; variances are sums of squares over n.

    O(n F^2 + F^3), in float64.

    Raises: ShapeError (x), ArgumentError (k not 1 to F).

    >>> x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 2.0])
    >>> principal_components(x, 1).directions.abs().round().flatten().tolist()
    [0.0, 1.0, 0.0]
    """
    if x.ndim != 2 or not len(x):
        raise refusal(ShapeError, "x has the wrong shape", given=list(x.shape), accepted="[n, F] with n at least 1")
    if not 1 <= k <= x.shape[1]:
        raise refusal(
            ArgumentError,
            f"samples of size {x.shape[1]} have other components",
            given=f"k={k}",
            accepted=f"1 to {x.shape[1]}",
        )
    centred = x.double() - x.double().mean(0)
    variances, directions = torch.linalg.eigh(centred.mT @ centred / len(x))
    return Components(x.double().mean(0), directions.flip(1)[:, :k], variances.flip(0).clamp_min(0))


def first_order_residuals(encoder: Tensor, decoder: Tensor, x: Tensor) -> tuple[float, float]:
    """Measure how far a linear autoencoder is from a stationary point: relative norms of the two conditions.

    Args:
        encoder: W1 `[k, F]`, without bias.
        decoder: W2 `[F, k]`, without bias.
        x: centred samples `[n, F]`.

    Returns:
        |(I - W2 W1) S W1^T| / |S W1^T| and |W2^T (I - W2 W1) S| / |W2^T S|, Frobenius norms.

    Raises: ShapeError.
    """
    W1, W2, x = encoder.double(), decoder.double(), x.double()
    if W1.ndim != 2 or W2.shape != W1.shape[::-1] or x.ndim != 2 or x.shape[1] != W1.shape[1]:
        raise refusal(
            ShapeError,
            "encoder, decoder and x do not fit each other",
            given=f"{list(encoder.shape)}, {list(decoder.shape)} and {list(x.shape)}",
            accepted="[k, F], [F, k] and [n, F]",
        )
    S = x.mT @ x / len(x)
    left = S @ W1.mT
    right = W2.mT @ S
    first = (left - W2 @ (W1 @ left)).norm() / left.norm()
    second = (right - (W2.mT @ W2) @ (W1 @ S)).norm() / right.norm()
    return first.item(), second.item()


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Return the angles between the column spaces of a `[F, k]` and b `[F, m]`, in degrees, smallest first.

    Cosines are the singular values of Qa^T Qb. Small angles are taken from sines instead, which lose no digits there.

    Raises: ShapeError.

    Source: Bjorck and Golub 1973, "Numerical methods for computing angles between linear subspaces".

    >>> principal_angles(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
    tensor([ 0., 90.], dtype=torch.float64)
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise refusal(
            ShapeError,
            "the bases do not fit each other",
            given=f"{list(a.shape)} and {list(b.shape)}",
            accepted="[F, k] and [F, m]",
        )
    qa, qb = torch.linalg.qr(a.double())[0], torch.linalg.qr(b.double())[0]
    if qa.shape[1] < qb.shape[1]:
        qa, qb = qb, qa
    cosines = torch.linalg.svdvals(qa.mT @ qb).clamp(max=1)
    sines = torch.linalg.svdvals(qb - qa @ (qa.mT @ qb)).clamp(max=1).flip(0)
    return torch.rad2deg(torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos()))


def shrunk_singular_values(variances: Tensor, weight_decay: float) -> Tensor:
    """Return the singular values of W1 and W2 at the regularised optimum: sqrt(max(0, 1 - lambda / sigma_i^2)).

    Args:
        variances: sigma_i^2, eigenvalues of S.
        weight_decay: lambda, in |X - W2 W1 X|^2 / n + lambda (|W1|^2 + |W2|^2).

    >>> shrunk_singular_values(torch.tensor([4.0, 1.0, 0.1]), 0.5)
    tensor([0.9354, 0.7071, 0.0000])
    """
    return (1 - weight_decay / variances).clamp_min(0).sqrt()


def orthonormality_defect(columns: Tensor) -> float:
    """Return |W^T W - I| / sqrt(k) for W `[F, k]`: 0 for orthonormal columns."""
    k = columns.shape[1]
    gram = columns.double().mT @ columns.double()
    return float((gram - torch.eye(k, dtype=gram.dtype)).norm()) / math.sqrt(k)
