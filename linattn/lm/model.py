"""A causal language model over integer tokens, with any attention kernel of this library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.errors import ArgumentError, ShapeError, refusal
from linattn.modules import LayerKind, Transformer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from linattn.decode import ModelCache


@dataclass(frozen=True)
class CausalLMConfig:
    """Sizes and kinds of layers of a `CausalLM`.

    Attributes:
        vocabulary: number of different tokens.
        context: the length to train with. The model itself takes any length: positions are rotary.
        layers, dim, heads, kv_heads, hidden, layer: see `linattn.modules.Transformer` and `Attention`.
        kernel: one name, or several for a hybrid: see `linattn.modules.Transformer`.
        form, qk_norm: see `linattn.modules.Attention`.
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
    kernel: str | tuple[str, ...] = "softmax"
    form: str | None = None
    layer: LayerKind = "prenorm"
    qk_norm: bool = False
    rotary: float = 10_000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.context < 1:
            raise refusal(
                ArgumentError,
                "vocabulary or context is too small",
                given=f"vocabulary={self.vocabulary} and context={self.context}",
                accepted="at least 1",
            )
        if not 0 <= self.dropout < 1:
            raise refusal(
                ArgumentError, "dropout is out of range", given=f"dropout={self.dropout}", accepted="0 <= dropout < 1"
            )


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

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None, cache: ModelCache | None = None) -> Tensor:
        """Compute logits of the next token: tokens int64 [B, T] -> [B, T, vocabulary].

        Args:
            tokens: int64 [B, T].
            key_mask: bool [B, T], True where a token is real and False where it is padding.
            cache: from `decode_cache`; stands in for the tokens before these, which are added to it.

        Raises:
            ShapeError: tokens are not [B, T].
        """
        if tokens.ndim != 2:
            raise refusal(ShapeError, "tokens have the wrong shape", given=tuple(tokens.shape), accepted="[B, T]")
        embedded = self.dropout(self.embedding(tokens))
        hidden: Tensor = self.transformer(embedded, key_mask=key_mask, cache=cache)
        return F.linear(hidden, self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Compute the mean cross entropy, in nats, of each token given those before it: int64 [B, T + 1] -> scalar.

        Raises:
            ShapeError: tokens are not [B, T + 1] with T at least 1.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise refusal(
                ShapeError,
                "tokens have the wrong shape",
                given=tuple(tokens.shape),
                accepted="[B, T + 1] with T at least 1",
            )
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def decode_cache(self, capacity: int | None = None) -> ModelCache:
        """Make empty caches for all layers, to be given to `forward`; see `linattn.decode`.

        Example:
            >>> model = CausalLM(CausalLMConfig(vocabulary=65, kernel="elu+1", layers=2, dim=64, heads=2)).eval()
            >>> tokens, cache = torch.randint(65, (1, 12)), model.decode_cache()
            >>> pieces = [model(tokens[:, :10], cache=cache), model(tokens[:, 10:], cache=cache)]
            >>> torch.allclose(torch.cat(pieces, dim=1), model(tokens), atol=1e-4)
            True
        """
        return self.transformer.decode_cache(capacity)

    def generate(self, tokens: Tensor, count: int, **options: Any) -> Tensor:
        """Continue `tokens` by `count` sampled ones, each from p = softmax(logits / temperature).

        The prompt is read once, then one token at a time beside a cache (`linattn.decode`): the time of a token and the
        memory do not grow with the position where the kernel has a state; for softmax both do.

        Args:
            tokens: int64 [B, T], T at least 1.
            count: tokens to add.
            **options: of the sampling, as follows.

        Options:
            key_mask: bool [B, T], True where a token is real: prompts of different lengths are padded on either side,
                each with one real token at least.
            temperature: 0 takes the most probable token; below 1 sharpens, above 1 flattens.
            top_k: sample among the k most probable tokens only.
            top_p: sample among the fewest tokens whose probabilities add up to top_p (Holtzman et al. 2020, "The
                curious case of neural text degeneration"); after top_k, if both are given.
            stop: a sequence that has drawn one of these tokens repeats it; when all have, generation ends early.
            look_back: how many tokens the model may look back on: when so many are held, it starts anew from the last
                half of them. For models that do not carry beyond the length they were trained with. None: no limit.
            generator: source of randomness, on the model's device; the global one when not given.

        Returns:
            int64 [B, T + count], or fewer after an early end, beginning with `tokens`. The model is in evaluation mode
            meanwhile and afterwards as it was.

        Raises:
            ShapeError: tokens are not [B, T] with T at least 1, or the mask is not like them.
            ArgumentError: a count, temperature, top_k, top_p or look_back outside its range, a row without real tokens.
        """
        return torch.cat((tokens, *self.stream(tokens, count, **options)), dim=1)

    def stream(
        self,
        tokens: Tensor,
        count: int,
        *,
        key_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Collection[int] = (),
        look_back: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Generate as `generate` does, but yield each new token, int64 [B, 1], as soon as it is drawn."""
        self._check_request(tokens, count, key_mask, look_back)
        pick = Sampler(temperature, top_k, top_p)
        stops = torch.tensor(sorted(stop), dtype=torch.long, device=tokens.device)
        return self._tokens(tokens, count, key_mask, pick, stops=stops, look_back=look_back, generator=generator)

    def _tokens(
        self,
        tokens: Tensor,
        count: int,
        key_mask: Tensor | None,
        pick: Sampler,
        *,
        stops: Tensor,
        look_back: int | None,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        was_training = self.training
        self.eval()
        window = Window(tokens, key_mask, look_back)
        stopped = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        last = tokens
        cache = None
        try:
            for _ in range(count):
                if cache is None or window.full:
                    cache = self.decode_cache()
                    logits = self._next_logits(*window.restart(), cache)
                else:
                    logits = self._next_logits(last, None, cache)
                last = torch.where(stopped, last[:, -1:], pick(logits, generator))
                window.add(last)
                yield last
                stopped = stopped | torch.isin(last, stops)
                if bool(stopped.all()):
                    return
        finally:
            self.train(was_training)

    @torch.no_grad()
    def _next_logits(self, tokens: Tensor, key_mask: Tensor | None, cache: ModelCache) -> Tensor:
        """Compute the logits after the last token of each sequence: [B, T] -> [B, vocabulary]."""
        hidden = self.transformer(self.embedding(tokens), key_mask=key_mask, cache=cache)
        return F.linear(hidden[:, -1], self.embedding.weight)

    def _check_request(self, tokens: Tensor, count: int, key_mask: Tensor | None, look_back: int | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise refusal(
                ShapeError,
                "tokens have the wrong shape",
                given=tuple(tokens.shape),
                accepted="[B, T] with T at least 1",
            )
        if key_mask is not None and key_mask.shape != tokens.shape:
            raise refusal(
                ShapeError,
                "key_mask has the wrong shape",
                given=tuple(key_mask.shape),
                accepted=f"that of tokens, {tuple(tokens.shape)}",
            )
        if key_mask is not None and not bool(key_mask.any(dim=1).all()):
            raise ArgumentError("key_mask leaves a prompt without any token; accepted: at least one True in each row")
        if count < 0 or (look_back is not None and look_back < 2):
            raise refusal(
                ArgumentError,
                "count or look_back is too small",
                given=f"count={count} and look_back={look_back}",
                accepted="count >= 0, look_back >= 2 or None",
            )


class Window:
    """The last tokens, padded on the left, from which a cache is filled, and filled anew once they are too many."""

    def __init__(self, tokens: Tensor, key_mask: Tensor | None, look_back: int | None) -> None:
        self.look_back, self.held = look_back, 0
        self.tokens, self.key_mask = tokens, key_mask
        if key_mask is not None:
            order = key_mask.to(torch.int8).argsort(dim=1, stable=True)  # padding first
            self.tokens, self.key_mask = tokens.gather(1, order), key_mask.gather(1, order)

    @property
    def full(self) -> bool:
        """Whether so many tokens are held that the cache has to be filled anew."""
        return self.look_back is not None and self.held >= self.look_back

    def restart(self) -> tuple[Tensor, Tensor | None]:
        """Choose the first tokens: the whole prompt, its last `look_back`, or the last half of a full window."""
        if self.look_back is not None:
            kept = self.look_back // 2 if self.held else self.look_back
            self.tokens = self.tokens[:, -kept:]
            self.key_mask = None if self.key_mask is None else self.key_mask[:, -kept:]
        self.held = self.tokens.shape[1]
        return self.tokens, self.key_mask

    def add(self, token: Tensor) -> None:
        """Hold one more token [B, 1]."""
        if self.look_back is None:
            return
        self.tokens = torch.cat((self.tokens, token), dim=1)
        if self.key_mask is not None:
            self.key_mask = torch.cat((self.key_mask, torch.ones_like(token, dtype=torch.bool)), dim=1)
        self.held += 1


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn; see `CausalLM.generate`. Call it with logits [B, vocabulary] for int64 [B, 1].

    Example:
        >>> Sampler(temperature=0)(torch.tensor([[0.1, 3.0, 2.0]]), None).item()
        1
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        k_fits = self.top_k is None or self.top_k >= 1
        p_fits = self.top_p is None or 0 < self.top_p <= 1
        if not self.temperature >= 0 or not k_fits or not p_fits:
            raise refusal(
                ArgumentError,
                "no token can be drawn",
                given=f"temperature={self.temperature}, top_k={self.top_k} and top_p={self.top_p}",
                accepted="temperature >= 0, top_k >= 1 or None, 0 < top_p <= 1 or None",
            )

    def __call__(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw one token a sequence."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        probability = (logits / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            falling, order = probability.sort(dim=-1, descending=True)
            enough = falling.cumsum(dim=-1) - falling >= self.top_p  # what comes before it suffices
            probability = probability.masked_fill(enough.gather(-1, order.argsort(dim=-1)), 0)
        return torch.multinomial(probability, 1, generator=generator)
