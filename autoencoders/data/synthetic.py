"""A Gaussian with a few wide directions, hidden by a random rotation; the wide directions carry the label.

The best k-dimensional linear code is known: principal components lose the variance of the directions they leave out.
With the defaults, 20 directions of variance 10 and 80 of variance 1: 230 at k = 5, 80 at k = 20, 0 from k = 100.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linattn.errors import ArgumentError, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence


class Split(NamedTuple):
    """Samples `x [n, F]` in float32 and their labels `y [n]`, int64 from 0."""

    x: Tensor
    y: Tensor


class SyntheticSet(NamedTuple):
    """Three disjoint splits, and the rotation `[F, F]` that was applied: `x @ rotation.T` is axis-aligned again."""

    train: Split
    valid: Split
    test: Split
    rotation: Tensor


def synthetic_set(
    samples: int = 20_000,
    input_size: int = 100,
    signal_size: int = 20,
    variance_scale: float = 10.0,
    fractions: Sequence[float] = (0.7, 0.2, 0.1),
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> SyntheticSet:
    """Draw z ~ N(0, diag(s, ..., s, 1, ..., 1)), rotate it, label it by `z_1 + ... + z_signal > 0`.

    Args:
        samples: n in all, enough for each split to hold at least one.
        input_size: F.
        signal_size: how many directions have variance s and carry the label, between 1 and F.
        variance_scale: s, positive.
        fractions: of train, validation and test; positive, summing to 1; sizes are rounded, test takes the rest.
        generator: source of all numbers, on the CPU; torch's global one by default.
        device: where the tensors end up.

    O(n F^2) time, O(n F) memory.

    Raises: ArgumentError.

    >>> data = synthetic_set(1000, generator=torch.Generator().manual_seed(0))
    >>> [len(split.y) for split in data[:3]]
    [700, 200, 100]
    >>> aligned = data.train.x @ data.rotation.T
    >>> torch.equal(data.train.y == 1, aligned[:, :20].sum(1) > 0)
    True
    """
    for name, value in {"samples": samples, "input_size": input_size, "signal_size": signal_size}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise refusal(ArgumentError, f"{name} is no count", given=repr(value), accepted="an int of at least 1")
    if signal_size > input_size:
        raise refusal(
            ArgumentError,
            "signal_size is larger than input_size",
            given=signal_size,
            accepted=f"at most input_size = {input_size}",
        )
    if not (math.isfinite(variance_scale) and variance_scale > 0):
        raise refusal(
            ArgumentError, "variance_scale is no variance", given=repr(variance_scale), accepted="finite and positive"
        )
    sizes = _split_sizes(samples, fractions)

    # In float64, so that the rotation is orthogonal to far below the rounding of the float32 data.
    z = torch.randn(samples, input_size, generator=generator, dtype=torch.float64)
    z[:, :signal_size] *= math.sqrt(variance_scale)
    y = (z[:, :signal_size].sum(1) > 0).long()
    rotation = _random_rotation(input_size, generator)
    x = (z @ rotation).to(device, torch.float32)

    cuts = [sizes[0], sizes[0] + sizes[1]]
    parts = zip(x.tensor_split(cuts), y.to(device).tensor_split(cuts), strict=True)
    train, valid, test = (Split(*part) for part in parts)
    return SyntheticSet(train, valid, test, rotation.to(device, torch.float32))


def _split_sizes(samples: int, fractions: Sequence[float]) -> list[int]:
    if len(fractions) != 3 or not all(0 < f < 1 for f in fractions) or not math.isclose(sum(fractions), 1):
        raise refusal(
            ArgumentError,
            "fractions cannot split a set",
            given=tuple(fractions),
            accepted="three positive numbers that sum to 1",
        )
    train, valid = round(samples * fractions[0]), round(samples * fractions[1])
    sizes = [train, valid, samples - train - valid]
    if min(sizes) < 1:
        raise refusal(
            ArgumentError,
            f"fractions {tuple(fractions)} leave a split empty",
            given=f"{samples} samples, splits of {sizes}",
            accepted="more samples",
        )
    return sizes


def _random_rotation(size: int, generator: torch.Generator | None) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    # QR alone prefers some rotations; fixing the signs of R's diagonal makes them uniform (Mezzadri, 2007).
    rotation: Tensor = q * r.diagonal().sign()
    return rotation
