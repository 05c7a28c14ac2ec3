"""A regression head on any recurrent network, and the task it is first tried on: the running average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError, DtypeError, ShapeError
from linattn.rnn.checks import check_size


class RecurrentRegressionModel(nn.Module):
    """One linear prediction a step: `p_t = A h_t + a`.

    Args:
        net: a recurrent network with an attribute `hidden_size`, called as `net(x) -> (all_h [B, T, H], state)`: the
            layers and stacks of this package, or `torch.nn.RNN`, `GRU`, `LSTM` with `batch_first=True`.
        output_dim: O, at least 1.

    Call: `model(x, initial=None, kept_states=None) -> (predictions, all_h)`
        initial and kept_states go to `net` as they are.
        Returns predictions `[B, T, O]` and all_h `[B, T, H]`.

    Raises: ArgumentError (net without hidden_size or not batch-first, output_dim); from a call, what `net` raises.

    >>> from linattn.rnn import RNNLayer
    >>> model = RecurrentRegressionModel(RNNLayer(2, 3), output_dim=4)
    >>> sum(p.numel() for p in model.parameters())
    34
    >>> predictions, all_h = model(torch.randn(5, 7, 2))
    >>> predictions.shape
    torch.Size([5, 7, 4])
    """

    def __init__(self, net: nn.Module, output_dim: int = 1) -> None:
        super().__init__()
        hidden_size = getattr(net, "hidden_size", None)
        if not isinstance(hidden_size, int):
            raise ArgumentError(f"net must have an int attribute hidden_size; {type(net).__name__} has {hidden_size!r}")
        if not getattr(net, "batch_first", True):
            raise ArgumentError(f"net must be batch-first, [B, T, F]; this {type(net).__name__} has batch_first=False")
        check_size("output_dim", output_dim)
        self.net = net
        self.head = nn.Linear(hidden_size, output_dim)
        reference = next(net.parameters(), None)
        if reference is not None:
            self.head.to(reference.device, reference.dtype)

    def forward(self, x: Tensor, initial: Any = None, kept_states: list[Any] | None = None) -> tuple[Tensor, Tensor]:
        # torch.nn's networks know no kept_states, so it is passed on only when asked for.
        kept = {} if kept_states is None else {"kept_states": kept_states}
        all_h, _ = self.net(x, initial, **kept)
        return self.head(all_h), all_h


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
        seq_len, batch_size: at least 1.
        generator: source of the numbers, torch's global one by default.
        device, dtype: of both tensors; a floating dtype.

    Raises: ArgumentError (sizes), DtypeError (not floating).

    >>> x, y = running_average_batch(4, 2)
    >>> torch.allclose(y[:, -1], x.mean(1))
    True
    """
    check_size("seq_len", seq_len)
    check_size("batch_size", batch_size)
    if dtype is not None and not dtype.is_floating_point:
        raise DtypeError(f"dtype must be a floating dtype, got {dtype}")
    x = torch.randn(batch_size, seq_len, 1, generator=generator, device=device, dtype=dtype)
    steps = torch.arange(1, seq_len + 1, device=x.device, dtype=x.dtype)
    return x, x.cumsum(1) / steps[:, None]


def running_average_loss(predictions: Tensor, targets: Tensor, last_timestep_only: bool = False) -> Tensor:
    """Mean squared error over all steps, or over the last step alone; a scalar.

    Args:
        predictions, targets: `[B, T]` or `[B, T, O]`, one shape and dtype, not empty.
        last_timestep_only: count the step T alone.

    Raises: ShapeError, DtypeError.

    >>> running_average_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])).item()
    5.0
    >>> running_average_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), last_timestep_only=True).item()
    9.0
    """
    # Broadcasting [B, T] against [B, T, 1] would give a plausible wrong number, so shapes must be equal.
    if predictions.shape != targets.shape or predictions.dim() not in (2, 3) or predictions.numel() == 0:
        raise ShapeError(
            "predictions and targets must share one non-empty shape [B, T] or [B, T, O], "
            f"got {list(predictions.shape)} and {list(targets.shape)}"
        )
    if predictions.dtype != targets.dtype:
        raise DtypeError(f"predictions and targets must share one dtype, got {predictions.dtype} and {targets.dtype}")
    error = (predictions - targets).square()
    return error[:, -1].mean() if last_timestep_only else error.mean()
