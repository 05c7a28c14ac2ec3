"""Beam search against exhaustive search, and on every kind of model that it drives."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linattn.bench.studies.networks.beam import EXAMPLE, example_step, exhaustive, search_example
from linattn.errors import ArgumentError, ShapeError
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.rnn import LSTM, RNN, BeamResult, LinearAttentionLayer, RecurrentLM, RNNLayer, beam_search, prefix_step


class Language:
    """Log-probabilities drawn for every text; the state is the text and, beside it, which sequence of the batch."""

    def __init__(self, M: int, seed: int, dead: float = 0.0) -> None:
        self.M, self.seed, self.dead = M, seed, dead
        self.calls = 0

    def log_probs(self, sequence: int, text: tuple[int, ...]) -> Tensor:
        number = hash((self.seed, sequence, text)) % (2**31)
        generator = torch.Generator().manual_seed(number)
        logits = 2 * torch.randn(self.M, generator=generator, dtype=torch.float64)
        dead = torch.rand(self.M, generator=generator) < self.dead
        dead[number % self.M] = False
        return logits.masked_fill(dead, -torch.inf).log_softmax(-1)

    def step(self, tokens: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        self.calls += 1
        text = torch.cat((state["text"], tokens[:, None]), 1)
        rows = [self.log_probs(s, tuple(t)) for s, t in zip(state["sequence"].tolist(), text.tolist(), strict=True)]
        return torch.stack(rows), {"text": text, "sequence": state["sequence"]}

    def start(self, B: int) -> dict[str, Any]:
        return {"text": torch.zeros(B, 0, dtype=torch.int64), "sequence": torch.arange(B)}

    def search(self, B: int, **options: Any) -> BeamResult:
        return beam_search(self.step, self.start(B), torch.zeros(B, dtype=torch.int64), **options)

    def all_texts(self, sequence: int, T: int, end: int | None, penalty: float) -> list[tuple[float, tuple[int, ...]]]:
        """Every complete text with its score, best first."""
        complete = []
        for length in range(1, T + 1):
            for text in product(range(self.M), repeat=length):
                if end in text[:-1] or (length < T and text[-1] != end):
                    continue
                parts = [self.log_probs(sequence, (0, *text[:t]))[text[t]].item() for t in range(length)]
                if sum(parts) > -torch.inf:
                    complete.append((sum(parts) / length**penalty, text))
        return sorted(complete, key=lambda pair: -pair[0])


def texts(result: BeamResult, row: int) -> list[tuple[int, ...]]:
    pairs = zip(result.tokens[row].tolist(), result.lengths[row].tolist(), strict=True)
    return [tuple(tokens[:length]) for tokens, length in pairs if length]


@given(
    M=st.integers(1, 4),
    T=st.integers(1, 4),
    B=st.integers(1, 3),
    n_best=st.integers(1, 6),
    penalty=st.sampled_from([0.0, 0.5, 1.0]),
    with_end=st.booleans(),
    dead=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 999),
)
def test_equal_to_exhaustive_search_when_the_beams_cover_the_space(
    M: int, T: int, B: int, n_best: int, penalty: float, with_end: bool, dead: float, seed: int
) -> None:
    language, end = Language(M, seed, dead), M - 1 if with_end else None
    beams = max(M**T, n_best)
    result = language.search(B, beams=beams, max_length=T, end_token=end, length_penalty=penalty, n_best=n_best)
    for row in range(B):
        best = language.all_texts(row, T, end, penalty)[:n_best]
        assert texts(result, row) == [text for _, text in best]
        expected = torch.tensor([score for score, _ in best], dtype=torch.float64)
        torch.testing.assert_close(result.scores[row, : len(best)], expected)
        assert (result.scores[row, len(best) :] == -torch.inf).all()
        assert (result.tokens[row, len(best) :] == -1).all()
    lengths = result.lengths.clamp(min=1)
    exists = result.lengths > 0
    torch.testing.assert_close(result.scores[exists], (result.log_probs / lengths**penalty)[exists])


@given(
    M=st.integers(2, 6),
    beams=st.integers(1, 5),
    penalty=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    seed=st.integers(0, 999),
)
def test_stopping_early_changes_nothing(M: int, beams: int, penalty: float, seed: int) -> None:
    results, calls = [], []
    for early_stop in (True, False):
        language = Language(M, seed)
        options = {"end_token": 0, "length_penalty": penalty, "n_best": max(1, beams - 1), "early_stop": early_stop}
        results.append(language.search(2, beams=beams, max_length=9, **options))
        calls.append(language.calls)
    early, late = results
    assert calls[0] <= calls[1] == 9
    assert torch.equal(early.scores, late.scores)
    assert [texts(early, row) for row in range(2)] == [texts(late, row) for row in range(2)]


def test_it_does_stop_early() -> None:
    table = torch.tensor([[0.98, 0.01, 0.01]]).log()
    calls = []

    def step(tokens: Tensor, state: None) -> tuple[Tensor, None]:
        calls.append(len(tokens))
        return table.expand(len(tokens), 3), None

    result = beam_search(step, None, torch.tensor([1]), beams=2, max_length=50, end_token=0)
    assert result.tokens.tolist() == [[[0]]]
    assert calls == [1]


@given(M=st.integers(2, 6), seed=st.integers(0, 999), with_end=st.booleans())
def test_one_beam_is_greedy(M: int, seed: int, with_end: bool) -> None:
    language, end = Language(M, seed), 0 if with_end else None
    result = language.search(1, beams=1, max_length=6, end_token=end)
    text: tuple[int, ...] = ()
    while len(text) < 6 and (not text or text[-1] != end):
        text += (int(language.log_probs(0, (0, *text)).argmax()),)
    assert texts(result, 0) == [text]


@given(seed=st.integers(0, 999), beams=st.integers(1, 5))
def test_sequences_of_a_batch_do_not_see_each_other(seed: int, beams: int) -> None:
    language = Language(5, seed)
    options = {"beams": beams, "max_length": 5, "end_token": 1, "n_best": beams}
    together = language.search(3, **options)
    for row in range(3):
        start = {"text": torch.zeros(1, 0, dtype=torch.int64), "sequence": torch.tensor([row])}
        alone = beam_search(language.step, start, torch.tensor([0]), **options)
        assert texts(alone, 0) == texts(together, row)
        assert torch.equal(alone.log_probs[0], together.log_probs[row])


# ---- The worked example ---------------------------------------------------------------------------------------------


def test_worked_example_step_by_step() -> None:
    for length, expected in ((1, [-0.65, -0.73]), (2, [-1.25, -1.33]), (3, [-1.85, -1.93])):
        result = beam_search(example_step, None, torch.tensor([0]), beams=2, max_length=length, n_best=2)
        assert result.log_probs[0].tolist() == pytest.approx(expected, abs=1e-6)
        if length == 2:
            assert result.tokens[0].tolist() == [[0, 1], [1, 0]]


def test_two_beams_miss_the_optimum_that_three_find() -> None:
    text, best = exhaustive(example_step, 2, 3)
    assert text == (0, 0, 0)
    assert best == pytest.approx(-1.46, abs=1e-6)
    assert search_example(2)[0][1] == pytest.approx(-1.85)
    assert search_example(1)[0][1] == pytest.approx(-1.85)
    assert search_example(3)[0] == ("neural neural neural", pytest.approx(-1.46))


def test_the_example_is_normalised_within_its_two_digits() -> None:
    for pair in EXAMPLE.values():
        assert sum(torch.tensor(pair).exp().tolist()) == pytest.approx(1, abs=0.006)


# ---- Models ---------------------------------------------------------------------------------------------------------


MODELS = {
    "rnn stack": lambda: RecurrentLM(7, RNN(6, 8, 2)),
    "lstm stack": lambda: RecurrentLM(7, LSTM(6, 8, 2)),
    "rnn layer": lambda: RecurrentLM(7, RNNLayer(6, 8)),
    "linear attention layer": lambda: RecurrentLM(7, LinearAttentionLayer(6, 8, heads=2)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_states_follow_their_beams(kind: str) -> None:
    """The log-probability that a search reports is the one of its text, read at once."""
    model = MODELS[kind]()
    with torch.no_grad():
        model.head.weight.mul_(4)
    first = torch.tensor([0, 3, 5])
    result = beam_search(model.step, None, first, beams=4, max_length=6, n_best=4, batch_dim=model.batch_dim)
    assert len({tuple(text) for text in result.tokens[0].tolist()}) == 4
    for row in range(3):
        for rank in range(4):
            text = torch.cat((first[row : row + 1], result.tokens[row, rank]))[None]
            log_probs = model(text[:, :-1])[0].log_softmax(-1)
            total = log_probs.gather(2, text[:, 1:, None]).sum()
            torch.testing.assert_close(result.log_probs[row, rank], total.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["elu+1", "quadratic", "softmax"])
def test_the_language_model_of_attention(kernel: str) -> None:
    model = CausalLM(CausalLMConfig(vocabulary=3, kernel=kernel, layers=1, dim=8, heads=2)).eval()
    step = prefix_step(model)
    result = beam_search(step, None, torch.tensor([1, 2]), beams=27, max_length=3)
    for row, first in enumerate((1, 2)):
        every = torch.tensor([(first, *text) for text in product(range(3), repeat=3)])
        log_probs = model(every[:, :-1]).log_softmax(-1).gather(2, every[:, 1:, None]).sum((1, 2))
        assert result.tokens[row, 0].tolist() == every[log_probs.argmax()][1:].tolist()
        torch.testing.assert_close(result.log_probs[row, 0], log_probs.max().detach())


# ---- Bad input ------------------------------------------------------------------------------------------------------


def _step(log_probs: Any) -> Any:
    return lambda tokens, state: (log_probs, state)


FIRST = torch.tensor([0, 0])
EVEN = torch.full((2, 3), 1 / 3).log()


@pytest.mark.parametrize(
    ("step", "state", "first", "options", "error", "message"),
    [
        (_step(EVEN), None, torch.tensor([0.0]), {}, ShapeError, "int64 tensor"),
        (_step(EVEN), None, FIRST, {"beams": 0}, ArgumentError, "beams"),
        (_step(EVEN), None, FIRST, {"max_length": 0}, ArgumentError, "max_length"),
        (_step(EVEN), None, FIRST, {"n_best": 3}, ArgumentError, "n_best=3 and beams=2"),
        (_step(EVEN), None, FIRST, {"length_penalty": -1.0}, ArgumentError, "length_penalty=-1.0"),
        (_step(EVEN), None, FIRST, {"end_token": 3}, ArgumentError, "end_token=3.*0 to 2"),
        (_step(EVEN[:1]), None, FIRST, {}, ShapeError, r"shape \[1, 3\]; accepted: a floating tensor \[2, M\]"),
        (_step(EVEN), None, FIRST, {}, ShapeError, r"\[2, 3\]; accepted: a floating tensor \[4, 3\]"),
        (_step(EVEN + 5), None, FIRST, {}, ArgumentError, "log-probabilities"),
        (_step(EVEN * torch.nan), None, FIRST, {}, ArgumentError, "nan"),
        (_step([0.0]), None, FIRST, {}, ShapeError, "list"),
        (_step(EVEN), "text", FIRST, {}, ArgumentError, "a state holds a str"),
    ],
)
def test_bad_searches(
    step: Any, state: Any, first: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        beam_search(step, state, first, **{"beams": 2, "max_length": 3, **options})
