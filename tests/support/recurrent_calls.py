"""Calls of the recurrence and their truth, for the tests of every backend of it."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.kernels.recurrent.contract import gates
from linattn.recurrence import recur


def drawn(cell: str, B: int, T: int, H: int, *, initial: bool = True, seed: int = 0) -> tuple[Tensor, ...]:
    """projected, weight_h, and the initial states."""
    generator = torch.Generator().manual_seed(seed)
    G = gates(cell)
    # Columns of an orthogonal matrix: without an activation, states stay as large as they were.
    weight = torch.linalg.qr(torch.randn(G * H, H, generator=generator))[0]
    states = [torch.randn(B, H, generator=generator) for _ in range(2 if cell == "lstm" else 1)]
    return torch.randn(B, T, G * H, generator=generator), weight, *(states if initial else ())


def everything(
    tensors: tuple[Tensor, ...], cell: str, backend: str, lengths: Tensor | None = None, read: str = "both"
) -> list[Tensor]:
    """Outputs, then gradients of all inputs, in fp64 if the backend is the reference."""
    if backend == "reference":
        tensors = tuple(t.double() for t in tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    projected, weight, *initial = leaves
    all_h, last = recur(projected, weight, tuple(initial) or None, cell=cell, lengths=lengths, backend=backend)
    outputs = {"both": [all_h, *last], "all": [all_h], "last": list(last)}[read]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def assert_nan_goes_nowhere(tensors: tuple[Tensor, ...], cell: str, backend: str, lengths: Tensor) -> None:
    """Not out of padding, and not out of sequence 2 into another."""
    projected, *rest = tensors
    B, T, _ = projected.shape
    behind = torch.arange(T, device=projected.device) >= lengths[:, None]
    clean = everything((projected.masked_fill(behind[..., None], 0), *rest), cell, backend, lengths)
    dirty = everything((projected.masked_fill(behind[..., None], torch.nan), *rest), cell, backend, lengths)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    assert not clean[0][behind].any()
    projected[2] = torch.nan
    poisoned, _ = recur(projected, rest[0], tuple(rest[1:]), cell=cell, backend=backend)
    others = [b for b in range(B) if b != 2]
    assert poisoned[others].isfinite().all()
    assert poisoned[2].isnan().all()
