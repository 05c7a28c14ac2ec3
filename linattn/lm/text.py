"""Text as characters: vocabulary, split, windows to train on, and the trigram model that has to be beaten."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linattn.errors import ArgumentError, DataError, refusal

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Characters:
    """A text, encoded.

    Attributes:
        alphabet: every character of the text once, sorted; token i is alphabet[i].
        train, validation: int64 tokens, the first 90 % and the last 10 % of the text.
        sha256: of the file's bytes, to recognise it again.

    Example:
        >>> text = Characters.from_text("hello, hello, hello, hello")
        >>> text.alphabet, text.decode(text.train[:5])
        (' ,ehlo', 'hello')
    """

    alphabet: str
    train: Tensor
    validation: Tensor
    sha256: str

    @classmethod
    def from_file(cls, path: str | Path) -> Characters:
        """Read a UTF-8 text file.

        Raises:
            DataError: the file is missing, cannot be read, is not UTF-8, or is too short to split.
        """
        expected = "accepted: a plain text file in UTF-8 of at least 20 characters"
        try:
            text = Path(path).read_bytes().decode("utf-8")
        except FileNotFoundError as error:
            raise DataError(f"there is no text file {path}; {expected}") from error
        except OSError as error:
            raise DataError(f"the text file {path} cannot be read: {error.strerror}; {expected}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the file {path} is not UTF-8 text (at byte {error.start}); {expected}") from error
        if len(text) < 20:
            raise DataError(f"the text file {path} holds {len(text)} characters; {expected}")
        return cls.from_text(text)

    @classmethod
    def from_text(cls, text: str) -> Characters:
        """Encode a text; its last tenth is for validation."""
        alphabet = "".join(sorted(set(text)))
        tokens = encode(text, alphabet)
        split = len(tokens) - max(1, int(len(tokens) * VALIDATION_SHARE))
        return cls(alphabet, tokens[:split], tokens[split:], hashlib.sha256(text.encode("utf-8")).hexdigest())

    def encode(self, text: str) -> Tensor:
        """Turn text into int64 tokens [T].

        Raises:
            DataError: a character that is not in the alphabet.
        """
        return encode(text, self.alphabet)

    def decode(self, tokens: Tensor) -> str:
        """Turn tokens [T] into text."""
        return decode(tokens, self.alphabet)


def decode(tokens: Tensor, alphabet: str) -> str:
    """Turn tokens [T] into text."""
    return "".join(alphabet[token] for token in tokens.tolist())


def encode(text: str, alphabet: str) -> Tensor:
    """Turn text into int64 tokens [T].

    Raises:
        DataError: a character that is not in the alphabet.
    """
    index = {character: token for token, character in enumerate(alphabet)}
    try:
        return torch.tensor([index[character] for character in text], dtype=torch.long)
    except KeyError as error:
        raise DataError(f"the character {error} is not in the alphabet; accepted: {alphabet!r}") from error


def random_windows(tokens: Tensor, count: int, length: int, *, seed: int, step: int) -> Tensor:
    """Draw `count` pieces of `length` consecutive tokens, begun anywhere with equal chance: int64 [count, length].

    Depends on nothing but the arguments, so that the data of a training step can be drawn again. Seed and step are not
    negative.

    Raises:
        DataError: the text is shorter than one window.
    """
    if len(tokens) < length:
        raise DataError(f"this part of the text has {len(tokens)} characters; accepted: at least {length}, context + 1")
    # Not torch's generator: on the CPU it heeds 32 bits of a seed, too few for a seed and a step.
    starts = torch.from_numpy(np.random.default_rng((seed, step)).integers(len(tokens) - length + 1, size=count))
    return tokens[starts[:, None] + torch.arange(length)]


def consecutive_windows(tokens: Tensor, context: int) -> Tensor:
    """Cut windows that predict every token but the first once: int64 [n, context + 1].

    Each begins on the last token of the one before. What does not fill a last window is left out. A text shorter than
    one window becomes one shorter window.

    Raises:
        DataError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise DataError(f"this part of the text has {len(tokens)} characters; accepted: at least 2")
    context = min(context, len(tokens) - 1)
    return tokens.unfold(0, context + 1, context)


class Trigram:
    """Predicts a character from the two before it: interpolated counts, smoothed as well as two numbers an order allow.

        P_n(c | h) = [max(count(h c) - d_n, 0) + (a_n + d_n types(h)) P_{n-1}(c | h')] / (count(h) + a_n)

    for contexts h of n = 2, 1, 0 characters, h' being h without its first one, types(h) the number of different
    characters seen after h, and P_{-1} uniform. d_n = 0 is a hierarchical Dirichlet model, a_n = 0 absolute
    discounting. Both numbers of each order are chosen on the last tenth of the training text, then all is counted.

    Args:
        train: int64 tokens [T].
        vocabulary: number of different tokens.

    Complexity: O(T log T) to count and to look up.

    Source: Teh 2006, "A hierarchical Bayesian language model based on Pitman-Yor processes"; here with plain counts
    in the lower orders.

    Example:
        >>> text = Characters.from_text("the cat sat on the mat and the hat. " * 50)
        >>> Trigram(text.train, len(text.alphabet)).loss(text.validation) < 0.5
        True
    """

    ORDERS = (0, 1, 2)
    DISCOUNTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    STRENGTHS = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

    def __init__(self, train: Tensor, vocabulary: int) -> None:
        if len(train) < 10:
            raise DataError(f"the training text has {len(train)} characters; accepted: at least 10 for a trigram model")
        self.vocabulary = vocabulary
        held_out = max(1, len(train) // 10)
        self.smoothing = [(0.5, 1.0)] * len(self.ORDERS)
        self._count(train[:-held_out])
        self._tune(train[-held_out:])
        self._count(train)

    def loss(self, text: Tensor) -> float:
        """Average -ln P in nats per character of tokens int64 [T], read as the continuation of the training text."""
        return -self.log_probability(text).mean().item()

    def log_probability(self, text: Tensor) -> Tensor:
        """Return ln P of each character of `text` [T], read as the continuation of the training text: float64 [T]."""
        return self._mix(self._look_up(text), self.smoothing).log()

    def _count(self, train: Tensor) -> None:
        self._before = train[-2:]
        self._tables = [_NGrams(_codes(train, order + 1, self.vocabulary), self.vocabulary) for order in self.ORDERS]

    def _look_up(self, text: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        running = torch.cat((self._before, text))
        # Codes of n + 1 characters that end on each character of `text`.
        codes = [_codes(running[2 - order :], order + 1, self.vocabulary) for order in self.ORDERS]
        return [table.look_up(code) for table, code in zip(self._tables, codes, strict=True)]

    def _mix(self, found: list[tuple[Tensor, Tensor, Tensor]], smoothing: list[tuple[float, float]]) -> Tensor:
        probability = torch.full_like(found[0][0], 1 / self.vocabulary)
        for (count, total, types), (discount, strength) in zip(found, smoothing, strict=True):
            mixed = ((count - discount).clamp(min=0) + (strength + discount * types) * probability) / (total + strength)
            probability = torch.where(total > 0, mixed, probability)  # a context never seen says nothing
        return probability

    def _tune(self, held_out: Tensor) -> None:
        found = self._look_up(held_out)

        def loss(order: int, choice: tuple[float, float]) -> float:
            trial = [*self.smoothing[:order], choice, *self.smoothing[order + 1 :]]
            return -self._mix(found, trial).log().mean().item()

        choices = [choice for choice in product(self.DISCOUNTS, self.STRENGTHS) if choice != (0.0, 0.0)]
        for _ in range(2):  # the best choice of one order depends a little on the others
            for order in self.ORDERS:
                losses = {choice: loss(order, choice) for choice in choices}
                self.smoothing[order] = min(losses, key=losses.__getitem__)


class _NGrams:
    """Counts of n-grams by code, their contexts being code // vocabulary."""

    def __init__(self, codes: Tensor, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.grams, self.counts = torch.unique(codes, return_counts=True)
        self.contexts, owner, self.types = torch.unique(
            self.grams // vocabulary, return_inverse=True, return_counts=True
        )
        self.totals = torch.zeros_like(self.contexts).index_add_(0, owner, self.counts)

    def look_up(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look up for each code: count(h c), count(h), types(h) as float64."""
        contexts = codes // self.vocabulary
        return (
            _find(self.grams, self.counts, codes),
            _find(self.contexts, self.totals, contexts),
            _find(self.contexts, self.types, contexts),
        )


def _codes(tokens: Tensor, length: int, vocabulary: int) -> Tensor:
    """Encode each run of `length` tokens as one number."""
    code = torch.zeros(len(tokens) - length + 1, dtype=torch.long)
    for position in range(length):
        code = code * vocabulary + tokens[position : len(tokens) - length + 1 + position]
    return code


def _find(keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
    """Return values[i] where keys[i] == query, 0 where it is no key; keys sorted. float64."""
    place = torch.searchsorted(keys, query).clamp(max=len(keys) - 1)
    return torch.where(keys[place] == query, values[place], 0).double()


def trigram_loss(train: Tensor, validation: Tensor, vocabulary: int | None = None) -> float:
    """Measure the tuned trigram model of `train` on `validation`, in nats per character; divide by ln 2 for bits.

    See `Trigram` for the model.

    Args:
        train: int64 tokens.
        validation: int64 tokens that follow them.
        vocabulary: number of different tokens; the largest token + 1 when not given.

    Raises:
        ArgumentError: tokens outside the vocabulary.
        DataError: fewer than 10 characters to train on, or none to validate on.
    """
    if len(validation) < 1:
        raise DataError("the validation text is empty; accepted: at least 1 character")
    largest = int(torch.cat((train, validation)).max())
    vocabulary = largest + 1 if vocabulary is None else vocabulary
    if largest >= vocabulary:
        raise refusal(
            ArgumentError,
            f"tokens are outside the vocabulary of {vocabulary}",
            given=f"token {largest}",
            accepted="tokens below it",
        )
    return Trigram(train, vocabulary).loss(validation)
