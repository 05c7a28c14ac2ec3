"""Language models as step functions, which is how beam search drives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError
from linattn.rnn.checks import check_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from linattn.rnn.beam import Step


class RecurrentLM(nn.Module):
    """Embedding, recurrent network, linear: position t predicts token t + 1 from the tokens up to t.

    Args:
        vocabulary: M, at least 1.
        net: a layer or stack of this package that reads vectors of `net.input_size`, in one direction.

    Call: `model(tokens int64 [B, T], state=None) -> (logits [B, T, M], state)`; the state is that of `net`.

    `step` is made for `beam_search`, with `batch_dim=model.batch_dim`: it needs the state alone, and so takes the same
    time at every step.

    Raises: ArgumentError.

    >>> from linattn.rnn import LSTM, beam_search
    >>> model = RecurrentLM(5, LSTM(8, 8))
    >>> result = beam_search(model.step, None, torch.tensor([0, 3]), beams=3, max_length=4, batch_dim=model.batch_dim)
    >>> result.tokens.shape
    torch.Size([2, 1, 4])
    """

    def __init__(self, vocabulary: int, net: nn.Module) -> None:
        super().__init__()
        check_size("vocabulary", vocabulary)
        if getattr(net, "reverse_layers", None) is not None:
            raise ArgumentError(
                "net is bidirectional, which cannot predict what it has read already; accepted: one way"
            )
        self.embedding = nn.Embedding(vocabulary, int(net.input_size))  # type: ignore[arg-type]
        self.net = net
        self.head = nn.Linear(int(net.hidden_size), vocabulary)  # type: ignore[arg-type]

    @property
    def batch_dim(self) -> int:
        """Where the batch stands in the tensors of a state: 1 for stacks, `[L, B, H]`, else 0."""
        return 1 if hasattr(self.net, "layers") else 0

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Compute logits `[B, T, M]` of the next tokens, and the state after them."""
        all_h, state = self.net(self.embedding(tokens), state)
        return self.head(all_h), state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read tokens int64 `[R]`; return log-probabilities of the next ones `[R, M]`, and the state after them."""
        logits, state = self(tokens[:, None], state)
        return logits[:, -1].log_softmax(-1), state


def prefix_step(model: Callable[[Tensor], Tensor]) -> Step:
    """Make a step function of any causal model `tokens int64 [B, T] -> logits [B, T, M]`, such as `CausalLM`.

    Its state is the text so far, int64 `[B, T]` or None, which the model reads anew at each step: right for every
    kernel, at the cost of a forward pass a step.

    >>> from linattn.lm.model import CausalLM, CausalLMConfig
    >>> from linattn.rnn import beam_search
    >>> model = CausalLM(CausalLMConfig(vocabulary=7, kernel="elu+1", layers=1, dim=16, heads=2))
    >>> beam_search(prefix_step(model), None, torch.tensor([2]), beams=2, max_length=3).lengths.tolist()
    [[3]]
    """

    def step(tokens: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor]:
        text = tokens[:, None] if text is None else torch.cat((text, tokens[:, None]), 1)
        return model(text)[:, -1].log_softmax(-1), text

    return step
