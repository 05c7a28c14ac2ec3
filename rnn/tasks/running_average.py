"""The first task of a recurrent network: the mean of what it has seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.errors import DtypeError, ShapeError, refusal
from linattn.rnn.checks import check_size


def running_average_batch(
    seq_len: int = 10,
    batch_size: int = 1,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw x ~ N(0, 1) and its running mean `y_t = (x_1 + ... + x_t) / t`; both `[batch_size, seq_len, 1]`.

    Args:
        seq_len: T, at least 1.
        batch_size: at least 1.
        generator: source of the numbers, torch's global one by default.
        device: of both tensors.
        dtype: of both tensors; a floating dtype.

    Raises: ArgumentError (sizes), DtypeError (not floating).

    >>> x, y = running_average_batch(4, 2)
    >>> torch.allclose(y[:, -1], x.mean(1))
    True
    """
    check_size("seq_len", seq_len)
    check_size("batch_size", batch_size)
    if dtype is not None and not dtype.is_floating_point:
        raise refusal(DtypeError, "numbers cannot be drawn", given=dtype, accepted="a floating dtype")
    x = torch.randn(batch_size, seq_len, 1, generator=generator, device=device, dtype=dtype)
    steps = torch.arange(1, seq_len + 1, device=x.device, dtype=x.dtype)
    return x, x.cumsum(1) / steps[:, None]


def running_average_loss(predictions: Tensor, targets: Tensor, last_timestep_only: bool = False) -> Tensor:
    """Return the mean squared error over all steps, or over the last step alone; a scalar.

    Args:
        predictions: `[B, T]` or `[B, T, O]`, not empty.
        targets: of the same shape and dtype.
        last_timestep_only: count the step T alone.

    Raises: ShapeError, DtypeError.

    >>> running_average_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item()
    5.0
    >>> running_average_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), last_timestep_only=True).item()
    9.0
    """
    # Broadcasting [B, T] against [B, T, 1] would give a plausible wrong number, so shapes must be equal.
    if predictions.shape != targets.shape or predictions.dim() not in (2, 3) or predictions.numel() == 0:
        raise refusal(
            ShapeError,
            "predictions and targets do not fit each other",
            given=f"{list(predictions.shape)} and {list(targets.shape)}",
            accepted="one non-empty shape [B, T] or [B, T, O]",
        )
    if predictions.dtype != targets.dtype:
        raise refusal(
            DtypeError,
            "predictions and targets do not fit each other",
            given=f"{predictions.dtype} and {targets.dtype}",
            accepted="one dtype",
        )
    error = (predictions - targets).square()
    return error[:, -1].mean() if last_timestep_only else error.mean()
