"""Corruptions of an input. The autoencoder sees the corrupted input and is asked for the clean one.

Each is a module without parameters, called as `corruption(x, generator=None)` with a floating x of any shape; it draws
anew at every call and gives a tensor of x's shape, dtype and device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError, DeviceError, DtypeError, refusal


class AdditiveNoise(nn.Module):
    """`x + std * N(0, 1)`, independently for every entry.

    Args:
        std: standard deviation, finite and at least 0; 0.5 by default.

    Raises: ArgumentError (std); DtypeError (x not floating); DeviceError (generator not on x's device).

    Source: Vincent et al., Extracting and composing robust features with denoising autoencoders, 2008.

    >>> x = torch.zeros(10_000)
    >>> abs(AdditiveNoise(0.5)(x).std().item() - 0.5) < 0.05
    True
    """

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        if not (math.isfinite(std) and std >= 0):
            raise refusal(
                ArgumentError, "std is no standard deviation", given=repr(std), accepted="finite and at least 0"
            )
        self.std = std

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add noise to x; draw it from `generator`, by default torch's global one."""
        _check(x, generator)
        return x + self.std * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    def extra_repr(self) -> str:
        """Name the standard deviation in the module's repr."""
        return f"std={self.std}"


class Masking(nn.Module):
    """Set every entry to a fixed value with probability p, independently.

    Args:
        probability: p in [0, 1), 0.25 by default.
        fill_value: what a dropped entry becomes, finite; 0 by default.

    Raises: ArgumentError (the two above); DtypeError (x not floating); DeviceError (generator not on x's device).

    Source: Vincent et al., 2008 (masking noise); He et al., Masked autoencoders are scalable vision learners, 2022.

    >>> x = torch.ones(10_000)
    >>> abs((Masking(0.25, fill_value=-1.0)(x) == -1).float().mean().item() - 0.25) < 0.05
    True
    """

    def __init__(self, probability: float = 0.25, fill_value: float = 0.0) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise refusal(
                ArgumentError, "probability is out of range", given=repr(probability), accepted="a number in [0, 1)"
            )
        if not math.isfinite(fill_value):
            raise refusal(
                ArgumentError, "fill_value is NaN or infinite", given=repr(fill_value), accepted="a finite number"
            )
        self.probability = probability
        self.fill_value = fill_value

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Drop entries of x; choose them by `generator`, by default torch's global one."""
        _check(x, generator)
        # Drawn in float32 for narrower inputs: bfloat16 has only 256 uniform values, so p would be off by up to 1/256.
        dtype = torch.promote_types(x.dtype, torch.float32)
        dropped = torch.rand(x.shape, generator=generator, dtype=dtype, device=x.device) < self.probability
        return x.masked_fill(dropped, self.fill_value)

    def extra_repr(self) -> str:
        """Name probability and fill value in the module's repr."""
        return f"probability={self.probability}, fill_value={self.fill_value}"


def _check(x: Tensor, generator: torch.Generator | None) -> None:
    if not x.is_floating_point():
        raise refusal(DtypeError, "x cannot be corrupted", given=x.dtype, accepted="a floating dtype")
    if generator is not None and generator.device.type != x.device.type:
        raise refusal(
            DeviceError, "the generator is on another device than x", given=generator.device, accepted=x.device
        )
