"""The one place where kernels are launched, or recorded instead.

A function that launches can be run on meta tensors inside `recording()`: its launches are then collected and not
executed, which is how the static report compiles, without a GPU, exactly what would run on one.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linattn.kernels.common.op.backend import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Iterator


class Launch(NamedTuple):
    """A kernel, how many programs of it, and with what."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Tell Triton what it needs beyond the arguments. Fusing a * b + c must not depend on its version's default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


MAX_TOKEN_STRIDE = 2**23
"""Elements from a token to the next: offsets inside a tile, of 256 tokens at most, are 32-bit."""


def with_unit_stride(x: Tensor) -> Tensor:
    """Return a tensor `[B, H, T, size]` with 1 as its last stride, as kernels read it. All other strides are free: it
    is copied only if the last one is not 1, or if tokens lie 32 MB apart.
    """
    adjacent = x.stride(3) == 1 or x.shape[3] == 1
    return x if adjacent and x.stride(2) < MAX_TOKEN_STRIDE else x.contiguous()


def block_size(size: int) -> int:
    """Return the side of a tile that holds `size`: a power of two, and at least the 16 that matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def strides_bht(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of batch, head and token of a tensor `[B, H, T, size]`: `stride_q` of a kernel."""
    b, h, t, _ = x.stride()
    return b, h, t


_recorded: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches made inside instead of executing them."""
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: Any, num_stages: Any, **arguments: Any) -> None:
    """Run `kernel` on `grid`; `arguments` are its parameters by name, constants included."""
    call = Launch(kernel, grid, arguments, num_warps, num_stages)
    if _recorded:
        _recorded[-1].append(call)
    elif INTERPRETED:
        _interpret(kernel, grid, arguments)
    else:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(next(x for x in arguments.values() if isinstance(x, Tensor))):
            kernel[grid](**arguments, **call.options)


def _interpret(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Triton's interpreter computes with bf16 and fp16 wrongly, or in their own precision. So kernels see fp32 tensors
    that hold the same values, round where they say so (`numerics.round_to`), and what they wrote is rounded again.
    """
    low = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)}
    memory = {name: _memory(x).float() for name, x in low.items()}
    wide = {name: flat.as_strided(low[name].shape, low[name].stride()) for name, flat in memory.items()}
    kernel[grid](**{**arguments, **wide})
    for name, x in low.items():
        if not torch.equal(wide[name].to(x.dtype), x):
            _memory(x).copy_(memory[name])


def _memory(x: Tensor) -> Tensor:
    """All elements between the first and the last of x, as they lie: x may repeat some and step over others."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((extent,), (1,))
