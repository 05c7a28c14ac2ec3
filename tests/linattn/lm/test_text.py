from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from linattn.errors import ArgumentError, DataError
from linattn.lm.text import Characters, Trigram, consecutive_windows, random_windows, trigram_loss

SHAKESPEARE = Path(__file__).resolve().parents[4] / "shared" / "data" / "text" / "tinyshakespeare.txt"


def test_a_text_is_encoded_and_split(tmp_path: Path) -> None:
    written = "naïve café, " * 10
    path = tmp_path / "text.txt"
    path.write_text(written, encoding="utf-8")
    text = Characters.from_file(path)
    assert text.alphabet == "".join(sorted(set(written)))
    assert text.decode(torch.cat((text.train, text.validation))) == written
    assert (len(text.train), len(text.validation)) == (108, 12)
    assert text.decode(text.encode("café")) == "café"
    with pytest.raises(DataError, match="character 'x' is not in the alphabet"):
        text.encode("cafx")
    assert text.sha256 != Characters.from_text(written + "!").sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no text file"), (b"\xff\xfe\x00" * 30, "is not UTF-8 text"), (b"short", "holds 5 characters")],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Characters.from_file(path)
    assert str(path) in str(caught.value)
    assert "accepted: a plain text file" in str(caught.value)


def test_a_folder_is_not_a_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Characters.from_file(tmp_path)


def test_random_windows_are_pieces_of_the_text_and_repeatable() -> None:
    tokens = torch.arange(50)
    windows = random_windows(tokens, 400, 8, seed=5, step=7)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert (windows[:, 0].min(), windows[:, 0].max()) == (0, 42)
    assert torch.equal(windows, random_windows(tokens, 400, 8, seed=5, step=7))
    assert not torch.equal(windows, random_windows(tokens, 400, 8, seed=6, step=7))
    assert not torch.equal(windows, random_windows(tokens, 400, 8, seed=5, step=8))
    with pytest.raises(DataError, match="has 50 characters; accepted: at least 51"):
        random_windows(tokens, 1, 51, seed=0, step=0)


def test_consecutive_windows_predict_every_token_once() -> None:
    windows = consecutive_windows(torch.arange(25), context=6)
    assert windows.shape == (4, 7)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 25))
    assert consecutive_windows(torch.arange(5), context=100).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(DataError, match="has 1 characters"):
        consecutive_windows(torch.arange(1), context=3)


def markov(length: int, seed: int) -> tuple[torch.Tensor, float]:
    """A chain over 4 symbols whose next symbol depends on the last two, and its entropy rate in nats."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)).pow(4)
    table /= table.sum(-1, keepdim=True)
    choice = torch.rand(length, generator=generator)
    rows = table.cumsum(-1).tolist()
    chain = [0, 1]
    surprise = []
    for u in choice.tolist():
        a, b = chain[-2:]
        following = next((c for c in range(4) if u < rows[a][b][c]), 3)
        surprise.append(-math.log(table[a, b, following]))
        chain.append(following)
    return torch.tensor(chain[2:]), sum(surprise) / length


def test_trigram_reaches_the_entropy_of_a_second_order_chain() -> None:
    train, _ = markov(30_000, seed=1)
    validation, entropy = markov(5_000, seed=2)
    assert trigram_loss(train, validation, 4) == pytest.approx(entropy, abs=0.01)


def test_trigram_probabilities_sum_to_one() -> None:
    text = Characters.from_text("the cat sat on the mat, the dog did not. " * 6)
    V = len(text.alphabet)
    model = Trigram(text.train, V)
    for before in ("th", "zq", "o "):
        context = torch.tensor([text.alphabet.find(c) % V for c in before])
        total = sum(model.log_probability(torch.cat((context, torch.tensor([c]))))[-1].exp().item() for c in range(V))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_trigram_counts_and_smooths_as_written() -> None:
    train = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 1, 0, 1, 2])
    model = Trigram(train, 3)
    model.smoothing = [(0.0, 1.0), (0.5, 0.0), (0.25, 2.0)]
    unigram = (5 + 1 / 3) / (12 + 1)  # 1 occurs 5 times
    bigram = (1 - 0.5 + 0.5 * 3 * unigram) / 5  # after 1: three times 2, once 1, once 0, so three types
    trigram = (1 - 0.25 + (2 + 0.25 * 2) * bigram) / (4 + 2)  # after 01: three times 2, once 1
    text = torch.tensor([0, 1, 1])
    assert model.log_probability(text)[-1].exp().item() == pytest.approx(trigram, rel=1e-12)
    # What follows the training text is read with its last two characters, 1 and 2, before it.
    torch.testing.assert_close(
        model.log_probability(torch.tensor([0]))[0], model.log_probability(torch.tensor([1, 2, 0]))[2]
    )


def test_trigram_chooses_smoothing_that_beats_fixed_ones_on_held_out_text() -> None:
    train, _ = markov(2_000, seed=3)
    model = Trigram(train, 4)
    model._count(train[:-200])
    tuned = model.loss(train[-200:])
    for fixed in ((0.0, 100.0), (0.9, 0.0), (0.5, 1.0)):
        model.smoothing = [fixed] * 3
        assert tuned < model.loss(train[-200:])


def test_trigram_gives_unseen_characters_a_chance() -> None:
    train = torch.tensor([0, 1] * 50)
    assert math.isfinite(trigram_loss(train, torch.tensor([0, 1, 2, 3]), 4))


def test_trigram_refuses_bad_input() -> None:
    with pytest.raises(ArgumentError, match="the vocabulary of 3; given: token 4"):
        trigram_loss(torch.arange(5).repeat(4), torch.arange(3), 3)
    with pytest.raises(DataError, match="validation text is empty"):
        trigram_loss(torch.arange(20), torch.arange(0))
    with pytest.raises(DataError, match="has 5 characters"):
        trigram_loss(torch.arange(5), torch.arange(3))


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the data folder is not here")
def test_trigram_of_the_real_text() -> None:
    text = Characters.from_file(SHAKESPEARE)
    assert len(text.alphabet) == 65
    assert trigram_loss(text.train, text.validation) == pytest.approx(2.038, abs=0.002)
