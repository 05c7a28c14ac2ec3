from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linattn.errors import ArgumentError, ShapeError
from linattn.lm.model import CausalLM, CausalLMConfig, Sampler


def tiny(**changes: object) -> CausalLM:
    torch.manual_seed(0)
    options = {"vocabulary": 11, "context": 6, "layers": 2, "dim": 16, "heads": 2, **changes}
    return CausalLM(CausalLMConfig(**options)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "taylor", "elu+1"])
def test_logits_are_causal_for_every_kernel(kernel: str, tokens: torch.Tensor) -> None:
    model = tiny(kernel=kernel)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])


def test_loss_is_mean_cross_entropy_of_the_next_token(tokens: torch.Tensor) -> None:
    model = tiny()
    logits = model(tokens)
    picked = [
        logits[b, t].log_softmax(-1)[tokens[b, t + 1]]
        for b in range(tokens.shape[0])
        for t in range(tokens.shape[1] - 1)
    ]
    torch.testing.assert_close(model.loss(tokens), -torch.stack(picked).mean())


def test_head_and_embedding_are_one(tokens: torch.Tensor) -> None:
    model = tiny()
    hidden = model.transformer(F.embedding(tokens, model.embedding.weight))
    torch.testing.assert_close(model(tokens), hidden @ model.embedding.weight.T)
    assert sum(p.shape == (11, 16) for p in model.parameters()) == 1


def test_any_length_is_allowed_and_costs_no_parameters() -> None:
    short, long = tiny(context=6), tiny(context=600)
    assert sum(p.numel() for p in short.parameters()) == sum(p.numel() for p in long.parameters())
    assert short(torch.zeros(1, 50, dtype=torch.long)).shape == (1, 50, 11)


def test_greedy_generation_repeats_the_argmax(tokens: torch.Tensor) -> None:
    model = tiny(context=100)
    expected = tokens
    for _ in range(4):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(tokens, 4, temperature=0), expected)
    assert torch.equal(model.generate(tokens, 4, top_k=1), expected)
    assert torch.equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize("kernel", ["quadratic", "elu+1", "favor+", ("quadratic", "softmax")])
def test_generation_beside_a_cache_is_reading_everything_again(kernel: str, tokens: torch.Tensor) -> None:
    model = tiny(kernel=kernel)
    expected = tokens
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(tokens, 12, temperature=0), expected)


def test_every_token_but_the_prompt_is_read_once(tokens: torch.Tensor) -> None:
    model = tiny()
    read: list[int] = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    model.generate(tokens, 4, temperature=0)
    assert read == [7, 1, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("look_back", [None, 9])
def test_prompts_of_different_lengths_are_continued_as_if_alone(look_back: int | None, side: str) -> None:
    model = tiny(kernel=("quadratic", "softmax"))
    prompts = [torch.randint(11, (length,)) for length in (3, 8, 5)]
    batch, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(8 - len(prompt), None) if side == "left" else slice(len(prompt))
        batch[row, place], mask[row, place] = prompt, True
    out = model.generate(batch, 6, key_mask=mask, temperature=0, look_back=look_back)
    assert torch.equal(out[:, :8], batch)
    if look_back is None:
        for row, prompt in enumerate(prompts):
            assert torch.equal(out[row, 8:], model.generate(prompt[None], 6, temperature=0)[0, len(prompt) :])


def test_looking_back_a_little_starts_anew_from_half(tokens: torch.Tensor) -> None:
    model = tiny()
    read: list[int] = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    out = model.generate(tokens, 9, temperature=0, look_back=6)
    assert read == [6, 3, 1, 1, 3, 1, 1, 3, 1]
    assert torch.equal(out[:, 7:8], model(tokens[:, -6:])[:, -1:].argmax(-1))
    assert torch.equal(out[:, 10:11], model(out[:, 5:10])[:, -1:].argmax(-1))


def test_generation_stops_where_it_is_told_to() -> None:
    model = tiny()
    start = torch.arange(8)[:, None]
    free = model.generate(start, 12, generator=torch.Generator().manual_seed(3))
    stop = {4, 7}
    out = model.generate(start, 12, stop=stop, generator=torch.Generator().manual_seed(3))
    for row, expected in zip(out[:, 1:].tolist(), free[:, 1:].tolist(), strict=True):
        end = next((i for i, token in enumerate(expected) if token in stop), len(expected))
        assert row[: end + 1] == expected[: end + 1]
        assert set(row[end:]) <= {row[end]} if end < len(row) else True
    greedy = model.generate(start[:1], 50, temperature=0)
    early = model.generate(start[:1], 50, temperature=0, stop=[int(greedy[0, 5])])
    assert early[0].tolist() == greedy[0, : early.shape[1]].tolist()
    assert early.shape[1] <= 6


def test_a_stream_gives_the_tokens_of_generate_one_by_one(tokens: torch.Tensor) -> None:
    model = tiny().train()
    whole = model.generate(tokens, 5, generator=torch.Generator().manual_seed(2))
    stream = model.stream(tokens, 5, generator=torch.Generator().manual_seed(2))
    first = next(stream)
    assert torch.equal(first, whole[:, 7:8])
    assert not model.training
    assert torch.equal(torch.cat((first, *stream), dim=1), whole[:, 7:])
    assert model.training


def test_top_p_keeps_the_fewest_tokens_that_suffice() -> None:
    logits = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log().expand(3000, -1)
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.6, {0, 2}), (0.9, {0, 2, 3}), (1.0, {0, 1, 2, 3})):
        drawn = Sampler(top_p=top_p)(logits, torch.Generator().manual_seed(0))
        assert set(drawn.flatten().tolist()) == kept
    both = Sampler(top_k=2, top_p=0.9)(logits, torch.Generator().manual_seed(0))  # of the two left, 0.625 and 0.375
    assert set(both.flatten().tolist()) == {0, 2}
    sharp = Sampler(temperature=0.1, top_p=0.9)(logits, torch.Generator().manual_seed(0))
    assert set(sharp.flatten().tolist()) == {0}


def test_hybrids_take_their_kernels_in_turn() -> None:
    model = tiny(kernel=("quadratic", "quadratic", "quadratic", "softmax"), layers=8, form="chunked")
    layers = model.transformer.layers
    assert [layer.attention.kernel for layer in layers] == ["quadratic", "quadratic", "quadratic", "softmax"] * 2
    assert [layer.attention.options.get("form") for layer in layers] == ["chunked", "chunked", "chunked", None] * 2
    with pytest.raises(ArgumentError, match="no kernel was given"):
        tiny(kernel=())


def test_sampling_follows_the_distribution() -> None:
    model = tiny()
    start = torch.full((4000, 1), 3)
    drawn = model.generate(start, 1, temperature=0.7, generator=torch.Generator().manual_seed(0))[:, 1]
    expected = (model(start[:1])[0, -1] / 0.7).softmax(-1)
    frequency = torch.bincount(drawn, minlength=11) / 4000
    torch.testing.assert_close(frequency, expected, atol=0.04, rtol=0)
    top = model.generate(start, 1, top_k=3, generator=torch.Generator().manual_seed(0))[:, 1]
    assert set(top.tolist()) == set(expected.topk(3).indices.tolist())


def test_sampling_is_repeatable_and_keeps_the_mode(tokens: torch.Tensor) -> None:
    model = tiny(dropout=0.5).train()
    runs = [model.generate(tokens, 5, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*runs)
    assert model.training


def test_bad_input_is_named(tokens: torch.Tensor) -> None:
    model = tiny()
    with pytest.raises(ShapeError, match=r"\(7,\); accepted: \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ShapeError, match=r"\(3, 1\); accepted: \[B, T \+ 1\]"):
        model.loss(tokens[:, :1])
    with pytest.raises(ShapeError, match=r"\(3, 0\)"):
        model.generate(tokens[:, :0], 1)
    with pytest.raises(ArgumentError, match="temperature=-1"):
        model.generate(tokens, 1, temperature=-1)
    with pytest.raises(ArgumentError, match="top_k=0"):
        model.generate(tokens, 1, top_k=0)
    with pytest.raises(ArgumentError, match="top_p=0"):
        model.generate(tokens, 1, top_p=0.0)
    with pytest.raises(ArgumentError, match="look_back=1"):
        model.generate(tokens, 1, look_back=1)
    with pytest.raises(ArgumentError, match="count=-1"):
        model.generate(tokens, -1)
    with pytest.raises(ShapeError, match="key_mask has the wrong shape"):
        model.generate(tokens, 1, key_mask=torch.ones(3, 6) > 0)
    with pytest.raises(ArgumentError, match="a prompt without any token"):
        model.generate(tokens, 1, key_mask=torch.zeros(3, 7) > 0)
    with pytest.raises(ArgumentError, match="vocabulary=0"):
        CausalLMConfig(vocabulary=0)
    with pytest.raises(ArgumentError, match="dropout=1"):
        CausalLMConfig(vocabulary=2, dropout=1.0)
