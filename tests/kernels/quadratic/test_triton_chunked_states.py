"""States of the quadratic form in Triton: made and taken up by its kernels, and stepped through in decoding."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn.states import QuadraticState
from linattn.testing import (
    assert_close_to_truth,
    assert_matches_truth,
    make_inputs,
    relative_error,
    truth_quadratic,
    truth_quadratic_state,
)
from tests.support.quadratic_calls import chunked, inputs, masked, parts_of_state, state_of, truth
from tests.support.triton_device import DEVICE, NEEDS_TRITON

pytestmark = [*NEEDS_TRITON, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("form", ["chunked", "direct"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_state_and_its_gradients(form: str, is_causal: bool) -> None:
    x = inputs(dtype=torch.float32, heads=2, kv_heads=1, head_size=20, value_size=16)
    options = {"is_causal": is_causal, "enable_gqa": True, "return_state": True, "form": form}

    def with_state(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out, state = chunked(**options)(q, k, v)
        assert state.n.tolist() == [70]
        return [out, *parts_of_state(state)]

    def true(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [truth_quadratic(q, k, v, is_causal=is_causal), *truth_quadratic_state(k, v)[1:]]

    assert_matches_truth(with_state, true, x)


@pytest.mark.parametrize("form", ["chunked", "direct"])
@pytest.mark.parametrize("cut", [3, 40, 69])
def test_pieces_are_the_whole(form: str, cut: int) -> None:
    """The gradient to the first piece flows through the state, and so does that to the state after both."""
    x = inputs(dtype=torch.float32)

    def in_two(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"is_causal": True, "return_state": True, "form": form}
        first, state = chunked(**options)(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
        rest, state = chunked(**options, initial_state=state)(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:])
        assert state.n.tolist() == [70]
        return [torch.cat([first, rest], 2), *parts_of_state(state)]

    def true(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [truth_quadratic(q, k, v, is_causal=True), *truth_quadratic_state(k, v)[1:]]

    assert_matches_truth(in_two, true, x)


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_states(is_causal: bool) -> None:
    cu_seqlens = torch.tensor([0, 0, 33, 38, 90], device=DEVICE, dtype=torch.int32)
    q, k, v = inputs(dtype=torch.float32, keys=90)
    past = make_inputs(batch=4, heads=1, keys=20, head_size=16, dtype=torch.float32, device=DEVICE, seed=5)[1:]
    options = {"is_causal": is_causal, "cu_seqlens": cu_seqlens}
    before = QuadraticState(*(x.float() if x.is_floating_point() else x for x in truth_quadratic_state(*past)))

    def with_state(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out, state = chunked(**options, initial_state=before, return_state=True)(q, k, v)
        assert state.n.tolist() == [20, 53, 25, 72]
        return [out, *parts_of_state(state)]

    def true(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        after = truth_quadratic_state(k, v, cu_seqlens=cu_seqlens)[1:]
        old = truth_quadratic_state(*past)[1:]
        return [truth_quadratic(q, k, v, **options, past=past), *(a + b for a, b in zip(after, old, strict=True))]

    assert_matches_truth(with_state, true, (q, k, v))


@pytest.mark.parametrize("form", ["chunked", "direct"])
def test_not_causal_rows_see_the_state_and_all_keys(form: str) -> None:
    q, k, v = inputs(dtype=torch.float32, batch=2, keys=40)
    past = make_inputs(batch=2, heads=1, keys=20, head_size=16, dtype=torch.float32, device=DEVICE, seed=5)[1:]
    before = QuadraticState(*(x.float() if x.is_floating_point() else x for x in truth_quadratic_state(*past)))
    assert_matches_truth(chunked(initial_state=before, form=form), truth(past=past), (q, k, v))


def test_a_state_without_keys_is_no_state() -> None:
    """Its queries with few keys are computed from scores, and its gradient is that of the reference."""
    q, k, v = inputs(dtype=torch.float32, batch=2, keys=60)
    mask = masked("few keys", 60)
    past = [x[:, :, :0] for x in (k, v)]
    empty = [x if x.dtype == torch.int64 else x.float() for x in truth_quadratic_state(*past)]

    def result(backend: str) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *empty[1:])]
        before = QuadraticState(empty[0], *leaves[3:])
        out = linattn.quadratic_attention(
            *leaves[:3], is_causal=True, key_mask=mask, initial_state=before, form="chunked", backend=backend
        )
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for ours, reference in zip(result("triton"), result("reference"), strict=True):
        assert_close_to_truth(ours, reference.double(), gradient=True)


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels but those of decoding."""
    from linattn.kernels.quadratic.gpu import launch

    monkeypatch.delattr(launch, "forward")


@pytest.mark.usefixtures("only_decoding")
@pytest.mark.parametrize(
    ("dtype", "D", "M", "options"),
    [
        (torch.float32, 16, 16, {"form": "recurrent"}),
        (torch.float32, 20, 17, {"scale": 0.7, "coefficients": (1, 1, 0.5)}),
        (torch.bfloat16, 32, 16, {}),
        (torch.bfloat16, 17, 20, {"coefficients": (0.5, -3, -2), "normalize": False}),
    ],
    ids=str,
)
def test_steps_are_the_whole(dtype: torch.dtype, D: int, M: int, options: dict[str, Any]) -> None:
    """One token three times, then, if that is not the recurrent form, three tokens."""
    x = inputs(dtype=dtype, keys=26, heads=4, kv_heads=2, head_size=D, value_size=M)
    state, outs = state_of(*(t[:, :, :20] for t in x[1:])), []
    steps = [20, 21, 22, 23] if "form" in options else [20, 21, 22, 23, 26]
    for start, stop in itertools.pairwise(steps):
        token = [t[:, :, start:stop] for t in x]
        how = {"form": "auto", "is_causal": True, "enable_gqa": True, "initial_state": state, "return_state": True}
        out, state = chunked(**how | options)(*token)
        outs.append(out)
    seen = [t[:, :, : steps[-1]] for t in x]
    true = truth_quadratic(*seen, is_causal=True, **{n: o for n, o in options.items() if n != "form"})
    assert_close_to_truth(torch.cat(outs, 2), true[:, :, 20:])
    for ours, expected in zip(state, truth_quadratic_state(*seen[1:]), strict=True):
        assert relative_error(ours, expected) < 1e-6


@pytest.mark.usefixtures("only_decoding")
@pytest.mark.parametrize("is_causal", [True, False])
def test_masked_tokens_are_not_added_to_a_state(is_causal: bool) -> None:
    q, k, v = inputs(dtype=torch.float32, keys=24, batch=2)
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]], device=DEVICE)
    past, new = [x[:, :, :20] for x in (k, v)], [x[:, :, 20:] for x in (k, v)]
    spoiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in new]
    options = {"is_causal": is_causal, "key_mask": mask}
    before = state_of(*past)
    out, after = chunked(**options, form="auto", initial_state=before, return_state=True)(q[:, :, 20:], *spoiled)
    assert_close_to_truth(out, truth_quadratic(q[:, :, 20:], *new, past=past, **options))
    assert after.n.tolist() == [23, 20]
    for ours, old, true in zip(after[1:], before[1:], truth_quadratic_state(*new, key_mask=mask)[1:], strict=True):
        assert relative_error(ours, old.double() + true) < 1e-6


@pytest.mark.usefixtures("only_decoding")
def test_the_first_token_gives_its_value() -> None:
    """Whatever its score: here it is -1 but for 1e-4, and the sums of a state would lose all digits."""
    q, k, v = inputs(dtype=torch.float32, keys=1)
    q = -(1 - 1e-4) * k / k.square().sum(-1, keepdim=True)
    out = chunked(is_causal=True, form="auto", initial_state=state_of(k[:, :, :0], v[:, :, :0]))(q, k, v)
    assert relative_error(out, v.double()) < 1e-6


@pytest.mark.parametrize("op", ["quadratic", "softmax"])
def test_a_step_on_a_cache_of_few_heads_fills_the_chip(op: str) -> None:
    """B H = 8: the keys are split among programs, and a second kernel adds up what they found, in one order."""
    from linattn.kernels.common.gpu import direct, similarity
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.common.gpu.launch import recording

    q = torch.empty(1, 8, 1, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, 8192, 64, dtype=torch.bfloat16, device="meta")
    kind = similarity.softmax(0.125) if op == "softmax" else similarity.quadratic(1.0, (1, 2, 1), True)
    with as_architecture("sm_90"), recording() as launches:
        direct.forward(direct.DirectProblem(q, k, k, None, None, True, 8191, kind, True))
    assert [x.kernel.__name__ for x in launches] == ["decode_kernel", "merge_kernel"]
    assert launches[0].arguments["SIMILARITY"] == kind.kind
    assert 132 <= launches[0].grid[0] <= 264
