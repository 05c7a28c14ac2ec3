"""A causal language model over integer tokens, with any attention kernel of this library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.errors import ArgumentError, ShapeError
from linattn.modules import LayerKind, Transformer


@dataclass(frozen=True)
class CausalLMConfig:
    """What a `CausalLM` is made of.

    Attributes:
        vocabulary: number of different tokens.
        context: positions that `generate` looks back on, and the length to train with. The model itself takes any
            length: positions are rotary.
        layers, dim, heads, kv_heads, hidden, layer: see `linattn.modules.Transformer` and `Attention`.
        kernel, form, qk_norm: see `linattn.modules.Attention`.
        rotary: base of the rotary positions.
        dropout: probability of dropping entries of embeddings and of each layer's branches in training.
    """

    vocabulary: int
    context: int = 256
    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int | None = None
    hidden: int | None = None
    kernel: str = "softmax"
    form: str | None = None
    layer: LayerKind = "prenorm"
    qk_norm: bool = False
    rotary: float = 10_000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.context < 1:
            raise ArgumentError(
                f"vocabulary={self.vocabulary} and context={self.context} were given; accepted: at least 1"
            )
        if not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout={self.dropout} was given; accepted: 0 <= dropout < 1")


class CausalLM(nn.Module):
    """Embedding E, causal transformer, and a head that shares the weights: logits = E transformer(E[tokens]).

    Position t predicts token t + 1 from tokens 0 ... t. Positions are rotary, inside every attention layer, so the
    number of parameters does not depend on the context and lengths beyond the trained one are defined (how well they
    work is a matter of training).

    Args:
        config: see `CausalLMConfig`.

    Source of the tied head: Press and Wolf 2017, "Using the output embedding to improve language models".

    Example:
        >>> model = CausalLM(CausalLMConfig(vocabulary=65, kernel="quadratic", layers=2, dim=64, heads=2))
        >>> model(torch.zeros(1, 10, dtype=torch.long)).shape
        torch.Size([1, 10, 65])
    """

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(
            config.layers,
            config.dim,
            config.heads,
            layer=config.layer,
            hidden=config.hidden,
            dropout=config.dropout,
            kernel=config.kernel,
            is_causal=True,
            kv_heads=config.kv_heads,
            form=config.form,
            qk_norm=config.qk_norm,
            rotary=config.rotary,
        )
        # The head multiplies by the same weights: a standard deviation of 1 / sqrt(dim) keeps the first logits near 1.
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token: tokens int64 [B, T] -> [B, T, vocabulary].

        Raises:
            ShapeError: tokens are not [B, T].
        """
        if tokens.ndim != 2:
            raise ShapeError(f"tokens have shape {tuple(tokens.shape)}; accepted: [B, T]")
        hidden: Tensor = self.transformer(self.dropout(self.embedding(tokens)))
        return F.linear(hidden, self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy, in nats, of predicting each token from those before it: int64 [B, T + 1] -> scalar.

        Raises:
            ShapeError: tokens are not [B, T + 1] with T at least 1.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ShapeError(f"tokens have shape {tuple(tokens.shape)}; accepted: [B, T + 1] with T at least 1")
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `tokens` by `count` sampled ones, each from p = softmax(logits / temperature).

        Every step runs the model again over the last `config.context` tokens: O(count * cost of one forward pass).

        Args:
            tokens: int64 [B, T], T at least 1.
            count: tokens to add.
            temperature: 0 takes the most probable token; below 1 sharpens, above 1 flattens.
            top_k: sample among the k most probable tokens only.
            generator: source of randomness, on the model's device; the global one when not given.

        Returns:
            int64 [B, T + count], beginning with `tokens`. The model is in evaluation mode meanwhile and afterwards as
            it was.

        Raises:
            ShapeError: tokens are not [B, T] with T at least 1.
            ArgumentError: a negative count or temperature, top_k below 1.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ShapeError(f"tokens have shape {tuple(tokens.shape)}; accepted: [B, T] with T at least 1")
        if count < 0 or not temperature >= 0 or (top_k is not None and top_k < 1):
            raise ArgumentError(
                f"count={count}, temperature={temperature} and top_k={top_k} were given; "
                "accepted: count >= 0, temperature >= 0, top_k >= 1 or None"
            )
        was_training = self.training
        self.eval()
        try:
            for _ in range(count):
                logits = self(tokens[:, -self.config.context :])[:, -1]
                tokens = torch.cat((tokens, _pick(logits, temperature, top_k, generator)), dim=1)
        finally:
            self.train(was_training)
        return tokens


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits [B, vocabulary] -> int64 [B, 1]."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
