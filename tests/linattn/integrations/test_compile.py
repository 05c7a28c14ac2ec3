"""torch.compile and torch.export around whole models: one graph, one compilation, the numbers of the eager model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import linattn
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.states import FeatureMapState, QuadraticState

pytestmark = pytest.mark.unpoisoned

KERNELS: dict[str, dict[str, Any]] = {
    "softmax": {"kernel": "softmax"},
    "quadratic direct": {"kernel": "quadratic", "form": "direct", "qk_norm": True},
    "quadratic chunked": {"kernel": "quadratic", "form": "chunked", "kv_heads": 1},
    "elu+1 chunked": {"kernel": "elu+1"},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_model(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CausalLMConfig(vocabulary=20, layers=1, dim=16, heads=2, **options))


def make_tokens(length: int) -> Tensor:
    return torch.randint(20, (2, length), generator=torch.Generator().manual_seed(length))


def loss_and_gradients(call: Any, model: CausalLM, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = call(tokens)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_the_language_model_is_one_graph_compiled_once_for_all_lengths(name: str) -> None:
    model = make_model(**KERNELS[name])
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (17, 40, 129):
        tokens = make_tokens(length)
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual = loss_and_gradients(compiled, model, tokens)
        for a, e in zip(actual, loss_and_gradients(model.loss, model, tokens), strict=True):
            assert torch.allclose(a, e, rtol=1e-4, atol=1e-6)


def test_a_length_marked_dynamic_is_compiled_once() -> None:
    """The same without dynamic=True, which leaves all other sizes fixed."""
    model = make_model(kernel="quadratic", form="chunked")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (17, 40, 300):
        tokens = make_tokens(length)
        torch._dynamo.mark_dynamic(tokens, 1)
        assert torch.allclose(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_language_model_compiles_to_machine_code() -> None:
    model = make_model(kernel="quadratic", form="chunked")
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True)
    for length in (17, 40):
        actual = loss_and_gradients(compiled, model, make_tokens(length))
        for a, e in zip(actual, loss_and_gradients(model.loss, model, make_tokens(length)), strict=True):
            assert torch.allclose(a, e, rtol=1e-3, atol=1e-5)


# ---- a decoding step -------------------------------------------------------------------------------------------------


class QuadraticStep(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, after = linattn.quadratic_attention(
            q, k, v, is_causal=True, initial_state=QuadraticState(*state), return_state=True, form="recurrent"
        )
        return out, list(after)


class LinearStep(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        out, after = linattn.linear_attention(
            q, k, v, is_causal=True, initial_state=FeatureMapState(*state), return_state=True, form="recurrent"
        )
        return out, list(after)


@pytest.mark.parametrize("kernel", ["quadratic", "elu+1"])
def test_a_decoding_step_is_exported(kernel: str) -> None:
    """The exported step, fed with its own state, gives the rows of the whole sequence."""
    B, H, D, T = 2, 2, 8, 30
    q, k, v = (torch.randn(B, H, T, D) / 2 for _ in range(3))
    step = QuadraticStep() if kernel == "quadratic" else LinearStep()
    state = list(QuadraticState.empty(B, H, D, D) if kernel == "quadratic" else FeatureMapState.empty(B, H, D, D))
    first = [t[:, :, :1] for t in (q, k, v)]
    program = torch.export.export(step, (*first, state))
    assert sum("linattn" in str(node.target) for node in program.graph.nodes) == 1
    exported, rows = program.module(), []
    for t in range(T):
        out, state = exported(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], state)
        rows.append(out)
    whole = linattn.attention(q, k, v, kernel=kernel, is_causal=True, form="chunked")
    # The first rows of (1 + s)^2 have few keys; a state alone loses digits there.
    assert torch.allclose(torch.cat(rows, dim=2)[:, :, 4:], whole[:, :, 4:], rtol=1e-3, atol=1e-4)
    assert state[0].tolist() == [T] * B


class ModelStep(nn.Module):
    """A model beside a cache that has read the prompt: the cache's tensors are buffers, which the program updates."""

    def __init__(self, model: CausalLM, prompt: Tensor, capacity: int) -> None:
        super().__init__()
        self.model, self.cache = model, model.decode_cache(capacity)
        model(prompt, cache=self.cache)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, cache=self.cache)


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
@torch.no_grad()
def test_the_decoding_step_of_a_whole_model_is_exported(kernel: str) -> None:
    model, tokens = make_model(kernel=kernel).eval(), make_tokens(30)
    step = ModelStep(model, tokens[:, :10], capacity=64)
    exported = torch.export.export(step, (tokens[:, 10:11],)).module()
    rows = [exported(tokens[:, t : t + 1]) for t in range(10, 30)]
    assert torch.allclose(torch.cat(rows, dim=1), model(tokens)[:, 10:], rtol=1e-3, atol=1e-4)
