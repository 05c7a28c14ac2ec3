"""Measure the most that a machine can do: bandwidth of a large copy, rate of a large matrix product in each dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.bench.measuring.cases import DTYPES
from linattn.bench.measuring.timing import summarise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COPY = "copy"


@dataclass(frozen=True)
class Ceilings:
    """Rates that the machine reached: GB/s of a copy, bytes read and written both counted, and GFLOP/s of products."""

    copy_gb_s: float
    matmul_gflops: dict[str, float]

    def at(self, intensity: float, dtype: str) -> float:
        """Return GFLOP/s that nothing of this intensity in flop/byte exceeds."""
        return min(self.matmul_gflops[dtype], self.copy_gb_s * intensity)


@dataclass(frozen=True)
class Extent:
    """Bytes to copy, and the side of the square matrices to multiply."""

    copy_bytes: int
    side: int


def calls_to_time(extent: Extent, dtypes: Sequence[str], device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return the calls: the copy, and a product of each dtype under its name."""
    source = torch.ones(extent.copy_bytes, dtype=torch.uint8, device=device)
    target, generator = torch.zeros_like(source), torch.Generator(device).manual_seed(0)
    calls: dict[str, Callable[[], Tensor]] = {COPY: lambda: target.copy_(source)}
    for dtype in dtypes:
        shape = (2, extent.side, extent.side)
        a, b = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
        calls[dtype] = lambda a=a, b=b: a @ b  # type: ignore[misc]
    return calls


def reached(extent: Extent, samples_ms: Mapping[str, list[float]]) -> Ceilings:
    """Return the medians of the samples of these calls."""
    ms = {name: summarise(samples).median for name, samples in samples_ms.items()}
    copy_ms = ms.pop(COPY)
    rates = {dtype: 2 * extent.side**3 / product_ms / 1e6 for dtype, product_ms in ms.items()}
    return Ceilings(2 * extent.copy_bytes / copy_ms / 1e6, rates)
