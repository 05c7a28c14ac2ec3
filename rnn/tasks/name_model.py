"""A network that reads a name letter by letter and predicts its language."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linattn.errors import CheckpointError, unknown_name
from linattn.rnn.heads import RecurrentClassifier
from linattn.rnn.stacks import LSTM, RNN
from linattn.rnn.tasks.names import PADDING, VOCABULARY, encode
from linattn.training.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

CELLS = {"rnn": RNN, "lstm": LSTM}


class NameClassifier(nn.Module):
    """Embedding -> RNN or LSTM -> state at the last letter -> dropout -> linear.

    Args:
        classes: languages.
        cell: "rnn" or "lstm".
        hidden: width of the embedding and of every layer.
        layers: of the network.
        dropout: of the last state, in training.

    Call: `model(tokens, lengths) -> logits [B, classes]`, as `names.encode` gives them.

    Raises: ArgumentError.

    >>> model = NameClassifier(18)
    >>> model(*encode(["Satoshi", "Li"])).shape
    torch.Size([2, 18])
    """

    def __init__(
        self, classes: int, cell: str = "lstm", hidden: int = 128, layers: int = 1, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise unknown_name("cell", cell, CELLS)
        self.classifier = RecurrentClassifier(CELLS[cell](hidden, hidden, layers), classes, dropout)
        self.embedding = nn.Embedding(VOCABULARY, hidden, padding_idx=PADDING)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Compute logits `[B, languages]` of names as `encode` gives them."""
        logits: Tensor = self.classifier(self.embedding(tokens), lengths)
        return logits

    @torch.no_grad()
    def guesses(self, name: str, languages: tuple[str, ...], count: int = 3) -> list[tuple[str, float]]:
        """Return the `count` most probable languages of one name, with their probabilities."""
        self.eval()
        probabilities = self(*encode([name])).softmax(-1)[0]
        best = probabilities.topk(min(count, len(languages)))
        return [(languages[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def saved_classifier(path: Path) -> tuple[NameClassifier, tuple[str, ...]]:
    """Load the model in a checkpoint of `linattn train names`, and its languages.

    Raises: CheckpointError for a checkpoint of something else.
    """
    checkpoint: dict[str, Any] = read_checkpoint(path)
    try:
        settings = checkpoint["settings"]
        languages = tuple(settings["languages"])
        shape = {name: settings[name] for name in ("cell", "hidden", "layers", "dropout")}
        model = NameClassifier(len(languages), **shape)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of `linattn train names`: {error}") from error
    return model, languages
