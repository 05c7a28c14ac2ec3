from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from linattn.errors import ArgumentError, ShapeError
from linattn.models import CausalLM, CausalLMConfig


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


def test_generation_looks_back_on_the_context_only(tokens: torch.Tensor) -> None:
    model = tiny(context=4)
    read: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    out = model.generate(tokens, 3, temperature=0)
    assert [window.tolist() for window in read] == [out[:, start : start + 4].tolist() for start in (3, 4, 5)]


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
    with pytest.raises(ArgumentError, match="vocabulary=0"):
        CausalLMConfig(vocabulary=0)
    with pytest.raises(ArgumentError, match="dropout=1"):
        CausalLMConfig(vocabulary=2, dropout=1.0)
