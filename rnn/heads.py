"""Heads of a recurrent network: a prediction at every step, or one class for the whole sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from linattn.errors import ArgumentError, refusal
from linattn.rnn.checks import check_size


class RecurrentRegressionModel(nn.Module):
    """One linear prediction a step: `p_t = A h_t + a`.

    Args:
        net: a recurrent network with an attribute `hidden_size`, called as `net(x) -> (all_h [B, T, H], state)`: the
            layers and stacks of this package, or `torch.nn.RNN`, `GRU`, `LSTM` with `batch_first=True`.
        output_dim: O, at least 1.

    Call: `model(x, initial=None, kept_states=None) -> (predictions, all_h)`
        initial and kept_states go to `net` as they are.
        Returns predictions `[B, T, O]` and all_h `[B, T, H]`; of a bidirectional net, both directions side by side.

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
        check_size("output_dim", output_dim)
        self.net = net
        self.head = _linear_behind(net, output_dim)

    def forward(self, x: Tensor, initial: Any = None, kept_states: list[Any] | None = None) -> tuple[Tensor, Tensor]:
        """Predict at every step; see the class."""
        # torch.nn's networks have no argument kept_states, so it is passed only when given.
        kept = {} if kept_states is None else {"kept_states": kept_states}
        all_h, _ = self.net(x, initial, **kept)
        return self.head(all_h), all_h


class RecurrentClassifier(nn.Module):
    """One class a sequence, from the state at its end: `logits = A dropout(h_T) + a`.

    Args:
        net: a layer or stack of this package; of a bidirectional one, the states at both ends are read.
        classes: at least 1.
        dropout: share of the state's entries that are dropped in training.

    Call: `model(x, lengths=None) -> logits [B, classes]`, x and lengths as `net` takes them.

    Raises: ArgumentError (net without hidden_size, classes, dropout outside [0, 1)); from a call, what `net` raises.

    >>> from linattn.rnn import LSTM
    >>> model = RecurrentClassifier(LSTM(2, 8), classes=3)
    >>> model(torch.randn(4, 5, 2), lengths=torch.tensor([5, 3, 1, 2])).shape
    torch.Size([4, 3])
    """

    def __init__(self, net: nn.Module, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_size("classes", classes)
        if not 0 <= dropout < 1:
            raise refusal(
                ArgumentError, "dropout is out of range", given=f"dropout={dropout}", accepted="0 <= dropout < 1"
            )
        self.net = net
        self.dropout = nn.Dropout(dropout)
        self.head = _linear_behind(net, classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Compute the logits of each sequence; see the class."""
        _, state = self.net(x, lengths=lengths)
        h = state if isinstance(state, Tensor) else state[0]
        if h.dim() == 3:  # of a stack: the top layer's, in all its directions
            directions = self.head.in_features // h.shape[2]
            h = h[-directions:].transpose(0, 1).flatten(1)
        logits: Tensor = self.head(self.dropout(h))
        return logits


def _linear_behind(net: nn.Module, outputs: int) -> nn.Linear:
    """Make a linear layer as wide as the network's output, of its dtype and on its device."""
    hidden_size = getattr(net, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise refusal(
            ArgumentError,
            "net has no width",
            given=f"hidden_size={hidden_size!r} of {type(net).__name__}",
            accepted="an int attribute hidden_size",
        )
    if not getattr(net, "batch_first", True):
        raise refusal(
            ArgumentError,
            "net is not batch-first",
            given=f"{type(net).__name__} with batch_first=False",
            accepted="batch_first=True, [B, T, F]",
        )
    directions = 2 if getattr(net, "bidirectional", False) else 1  # of torch.nn's networks
    linear = nn.Linear(getattr(net, "output_size", directions * hidden_size), outputs)
    reference = next(net.parameters(), None)
    return linear if reference is None else linear.to(reference.device, reference.dtype)
