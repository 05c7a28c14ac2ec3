"""The chunked quadratic form in Triton: the truth, the direct form and the reference agree with it, in every option."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import linattn
from linattn.kernels.common.backend import INTERPRETED
from linattn.kernels.common.stateful import Plan
from linattn.kernels.quadratic.contract import Options
from linattn.state import QuadraticState
from linattn.testing import (
    assert_close_to_truth,
    assert_matches_truth,
    condition_number,
    make_inputs,
    make_key_mask,
    relative_error,
    row_errors,
    truth_quadratic,
    truth_quadratic_state,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="needs a CUDA device or TRITON_INTERPRET=1"),
]
Function = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def chunked(**options: Any) -> Function:
    return lambda q, k, v: linattn.quadratic_attention(q, k, v, **{"form": "chunked", **options}, backend="triton")


def inputs(**how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """One head of 70 keys unless said otherwise: three chunks in the interpreter."""
    return make_inputs(**{"batch": 1, "heads": 1, "keys": 70, "head_size": 16, "device": DEVICE, **how})


def truth(**options: Any) -> Function:
    return lambda q, k, v: truth_quadratic(q, k, v, **options)


def test_memory_is_poisoned() -> None:
    assert inputs()[0].new_empty(3).isnan().all()


# ---- plain calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_truth_in_every_dtype(dtype: torch.dtype, is_causal: bool) -> None:
    x = inputs(dtype=dtype)
    assert_matches_truth(chunked(is_causal=is_causal), truth(is_causal=is_causal), x)


@pytest.mark.parametrize(
    "how",
    [
        {"head_size": 32, "value_size": 16, "layout": "fused", "keys": 40},
        {"head_size": 20, "value_size": 33, "layout": "strided", "keys": 33},
        {"head_size": 16, "value_size": 16, "layout": "transposed", "heads": 4, "kv_heads": 2, "batch": 2, "keys": 37},
        {"keys": 1},
        {"keys": 15},
        {"keys": 129},
    ],
    ids=str,
)
def test_truth_in_every_shape(how: dict[str, Any]) -> None:
    x = inputs(dtype=torch.float32, **how)
    options = {"is_causal": True, "scale": 0.7}
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), x)


@pytest.mark.parametrize("D, M", [(64, 128), (128, 64)])
def test_truth_in_large_heads(D: int, M: int) -> None:
    x = inputs(dtype=torch.float32, keys=40, head_size=D, value_size=M)
    assert_matches_truth(chunked(is_causal=True), truth(is_causal=True), x)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "coefficients": (1, 1, 0.5)},
        {"is_causal": False, "coefficients": (0, 0, 1)},
        {"is_causal": True, "coefficients": (0.5, -3, -2), "normalize": False},
        {"is_causal": False, "coefficients": (0.5, -3, -2), "normalize": False},
        {"is_causal": True, "scale": 0.0},
        {"is_causal": True, "scale": -1.5},
    ],
    ids=str,
)
def test_truth_with_every_polynomial(options: dict[str, Any]) -> None:
    x = inputs(dtype=torch.float32, keys=50)
    assert_matches_truth(chunked(**options), truth(**options), x)


@pytest.mark.parametrize("q_offset", [-40, -7, 5, 33, 100])
def test_truth_where_queries_and_keys_differ_in_number(q_offset: int) -> None:
    x = inputs(dtype=torch.float32, queries=45, keys=66)
    options = {"is_causal": True, "q_offset": q_offset}
    assert_matches_truth(chunked(**options), truth(**options), x)


# ---- masks and packed sequences --------------------------------------------------------------------------------------


def masked(keep: str, keys: int) -> Tensor:
    """[2, keys]. One element has 20 keys or more, so that rows of both kinds, with and without sums, are there."""
    mask = make_key_mask(2, keys)
    if keep == "left padding":
        mask[0, :40], mask[1, :3] = False, False
    elif keep == "few keys":
        mask[0] = False
        mask[0, 35:60:3] = True
    elif keep == "none":
        mask[0] = False
    return mask.to(DEVICE)


@pytest.mark.parametrize("keep", ["some", "left padding", "few keys", "none"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_masked_keys_do_not_count(keep: str, is_causal: bool) -> None:
    q, k, v = inputs(dtype=torch.float32, batch=2, keys=80)
    mask = masked(keep, 80)
    spoiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v)]
    options = {"is_causal": is_causal, "key_mask": mask}

    def of_real_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.masked_fill(~mask[:, None, :, None], 0) for x in (k, v))
        return truth_quadratic(q, k, v, **options)

    assert_matches_truth(chunked(**options), of_real_keys, (q, *spoiled))


LENGTHS = (0, 5, 40, 0, 70, 17, 0)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_sequences_know_nothing_of_each_other(is_causal: bool, with_mask: bool) -> None:
    cu_seqlens = torch.tensor(LENGTHS, device=DEVICE).cumsum(0)
    T = int(cu_seqlens[-1])
    q, k, v = inputs(dtype=torch.float32, keys=T, heads=2, kv_heads=1)
    mask = make_key_mask(1, T, keep=0.5).to(DEVICE) if with_mask else None
    cu_seqlens = torch.nn.functional.pad(cu_seqlens, (1, 0)).int()
    options = {"is_causal": is_causal, "cu_seqlens": cu_seqlens, "key_mask": mask}
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), (q, k, v))


def test_nan_stays_in_its_sequence() -> None:
    q, k, v = inputs(dtype=torch.float32, keys=90)
    cu_seqlens = torch.tensor([0, 41, 90], device=DEVICE, dtype=torch.int32)
    for x in (q, k, v):
        x[:, :, 41:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = chunked(is_causal=True, cu_seqlens=cu_seqlens)(*leaves)
    gradients = torch.autograd.grad(out[:, :, :41].sum() + 0 * out[:, :, 41:].nan_to_num().sum(), leaves)
    assert out[:, :, :41].isfinite().all()
    assert all(g[:, :, :41].isfinite().all() for g in gradients)


# ---- states ----------------------------------------------------------------------------------------------------------


def parts_of_state(state: QuadraticState) -> list[Tensor]:
    return [x for x in state if x.is_floating_point()]


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
    """Its rows with few keys are computed from scores, and its gradient is that of the reference."""
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


# ---- decoding ------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels but those of a step."""
    from linattn.kernels.quadratic.gpu import chunked

    monkeypatch.delattr(chunked, "forward")


def state_of(k: Tensor, v: Tensor) -> QuadraticState:
    return QuadraticState(*(x.float() if x.is_floating_point() else x for x in truth_quadratic_state(k, v)))


@pytest.mark.usefixtures("only_steps")
@pytest.mark.parametrize(
    "dtype, D, M, options",
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
    for start, stop in zip(steps, steps[1:], strict=False):
        token = [t[:, :, start:stop] for t in x]
        how = {"form": "auto", "is_causal": True, "enable_gqa": True, "initial_state": state, "return_state": True}
        out, state = chunked(**how | options)(*token)
        outs.append(out)
    seen = [t[:, :, : steps[-1]] for t in x]
    true = truth_quadratic(*seen, is_causal=True, **{n: o for n, o in options.items() if n != "form"})
    assert_close_to_truth(torch.cat(outs, 2), true[:, :, 20:])
    for ours, expected in zip(state, truth_quadratic_state(*seen[1:]), strict=True):
        assert relative_error(ours, expected) < 1e-6


@pytest.mark.usefixtures("only_steps")
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


@pytest.mark.usefixtures("only_steps")
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
        direct.forward(direct.Problem(q, k, k, None, None, True, 8191, kind, True))
    assert [x.kernel.__name__ for x in launches] == ["decode_kernel", "merge_kernel"]
    assert launches[0].arguments["SIMILARITY"] == kind.kind
    assert 132 <= launches[0].grid[0] <= 264


# ---- numerics --------------------------------------------------------------------------------------------------------


def near_minus_one(spread: float, **how: Any) -> list[Tensor]:
    """All scores are -1 but for about `spread`: what the sums add up to has cancelled."""
    q, k, v = inputs(dtype=torch.float64, **how)
    direction = torch.nn.functional.normalize(q[:1, :1, :1], dim=-1)
    return [spread * q - direction, spread * k + direction, v]


def lost_rows(*arguments: Any, **options: Any) -> int:
    """How many rows of a call compute all of their scores, since the sums would lose their digits."""
    from linattn.kernels.quadratic.gpu import chunked as kernels

    how = Options(True, 0, 1.0, 1.0, 2.0, 1.0, True)._replace(**options)
    _, _, _, saved = kernels.forward(*arguments, None, None, [], how, False, True, Plan("chunked", "triton"))
    return int(saved[0].sum())


CROWDED = [
    (torch.float32, {"keys": 70}, {"is_causal": True}),
    (torch.bfloat16, {"keys": 70, "heads": 4, "kv_heads": 2, "batch": 2}, {"is_causal": True}),
    (torch.bfloat16, {"keys": 50, "head_size": 20, "value_size": 33}, {"is_causal": False}),
    (torch.float16, {"keys": 70}, {"is_causal": True, "q_offset": 7}),
]


@pytest.mark.parametrize("dtype, how, options", CROWDED, ids=str)
def test_truth_where_all_scores_are_near_minus_one(dtype: torch.dtype, how: Any, options: Any) -> None:
    """The sums would lose all digits of bf16, most of fp32, so these rows compute their scores."""
    x = [t.to(dtype) for t in near_minus_one(0.05, **how)]
    assert lost_rows(*x, **options) > 20
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), x)


@pytest.mark.parametrize("is_causal", [True, False])
def test_some_rows_near_minus_one_among_packed_and_masked_ones(is_causal: bool) -> None:
    """Only some rows of a tile, of one sequence, with masked keys before them."""
    cu_seqlens = torch.tensor([0, 45, 50, 130], device=DEVICE, dtype=torch.int32)
    q, k, v = inputs(dtype=torch.float64, keys=130, heads=2, kv_heads=1)
    crowded = near_minus_one(0.03, keys=130, heads=2, kv_heads=1)
    q[:, :, 100:119], k[:, :, 50:] = crowded[0][:, :, 100:119], crowded[1][:, :, 50:]
    mask = make_key_mask(1, 130, keep=0.8).to(DEVICE)
    options = {"is_causal": is_causal, "cu_seqlens": cu_seqlens, "key_mask": mask}
    x = [t.bfloat16() for t in (q, k, v)]
    assert_matches_truth(chunked(**options, enable_gqa=True), truth(**options), x)


def test_rows_orthogonal_to_all_keys() -> None:
    """s^2 vanishes in directions that no axis shows: no term of the row sum is large, only what it is summed from."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, 70, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    rotation = torch.linalg.qr(k[0, 0, :16])[0]
    q[..., :8], k[..., 8:] = 0.02 * q[..., :8], 0
    x = [t.to(DEVICE, torch.bfloat16) for t in (q @ rotation, k @ rotation, v)]
    options = {"is_causal": True, "coefficients": (0, 0, 1)}
    assert_matches_truth(chunked(**options), truth(**options), x)
    assert lost_rows(*x, c0=0.0, c1=0.0) > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_row_of_plain_inputs_is_lost(dtype: torch.dtype) -> None:
    assert lost_rows(*inputs(dtype=dtype, keys=130)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_where_the_keys_of_a_state_were_near_minus_one(dtype: torch.dtype) -> None:
    """They are gone, so the error grows with kappa, as the reference's does."""
    x = [t.to(dtype) for t in near_minus_one(0.05, keys=96)]
    state = state_of(*(t[:, :, :60] for t in x[1:]))
    rest = [t[:, :, 60:] for t in x]
    out = chunked(is_causal=True, initial_state=state)(*rest)
    errors = row_errors(out, truth_quadratic(*x, is_causal=True)[:, :, 60:], x[2])
    kappa = condition_number(*x[:2], is_causal=True)[:, :, 60:]
    assert kappa.median() > 50
    assert (errors <= 4 * torch.finfo(dtype).eps * kappa).all()


def test_fp16_scores_whose_squares_leave_its_range() -> None:
    q, k, v = inputs(dtype=torch.float64, keys=70, positive=True)
    x = [t.half() for t in (24 * q, 24 * k, v)]
    scores = (x[0].double() @ x[1].double().mT).abs()
    assert scores.max() > 300
    assert_matches_truth(chunked(is_causal=True), truth(is_causal=True), x)


def test_sums_far_from_zero_keep_their_digits() -> None:
    """All keys and values alike: sums grow with N and every term weighs the same."""
    q, k, v = inputs(dtype=torch.float32, keys=130, positive=True)
    assert_matches_truth(chunked(is_causal=True), truth(is_causal=True), (q, k, v + 3))


def test_results_repeat_bit_by_bit() -> None:
    x = [t.requires_grad_() for t in inputs(dtype=torch.bfloat16, keys=40, heads=2, kv_heads=1)]
    runs = []
    for _ in range(2):
        out = chunked(is_causal=True, enable_gqa=True)(*x)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), x)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- memory --------------------------------------------------------------------------------------------------------


def everything(*x: Tensor, **options: Any) -> list[Tensor]:
    """Output, state and gradients, those through the initial state among them."""
    leaves = [t.clone().requires_grad_() for t in x]
    how = {"is_causal": True, "enable_gqa": True, "return_state": True}
    past, state = chunked(**how)(*(t[:, :, :40] for t in leaves)) if not options else (leaves[0][:0], None)
    out, after = chunked(**how, **options, initial_state=state)(*leaves)
    loss = out.float().square().sum() + sum(t.square().sum() for t in parts_of_state(after)) + past.float().sum()
    return [out.detach(), *(t.detach() for t in after), *torch.autograd.grad(loss, leaves)]


def launched(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that a call runs."""
    from linattn.kernels.quadratic.gpu import call as calls

    names, run = [], calls.launch
    monkeypatch.setattr(calls, "launch", lambda kernel, *a, **k: (names.append(kernel.__name__), run(kernel, *a, **k)))
    call()
    monkeypatch.setattr(calls, "launch", run)
    return names


@pytest.mark.parametrize("batch, heads, kv_heads, at_once", [(1, 4, 2, 1), (3, 2, 1, 2)])
def test_groups_of_heads_change_no_bit(
    batch: int, heads: int, kv_heads: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace for `at_once` key heads. Sums are cut into runs, so that their order could depend on the heads."""
    x = inputs(dtype=torch.bfloat16, batch=batch, heads=heads, kv_heads=kv_heads, keys=140)
    monkeypatch.setenv("LINATTN_KEEP_SUMS", "never")
    whole = everything(*x)
    names = launched(lambda: chunked(is_causal=True, enable_gqa=True)(*x), monkeypatch)
    from linattn.kernels.quadratic.gpu import memory

    monkeypatch.setattr(memory, "_bytes_of_head", lambda call: 1000)
    monkeypatch.setenv("LINATTN_WORKSPACE", str(1000 * at_once))
    for ours, expected in zip(everything(*x), whole, strict=True):
        assert torch.equal(ours, expected)
    groups = -(-batch * kv_heads // at_once)
    assert names * groups == launched(lambda: chunked(is_causal=True, enable_gqa=True)(*x), monkeypatch)


def test_groups_of_heads_of_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(dtype=torch.float32, heads=2, keys=100)
    cu_seqlens = torch.tensor([0, 30, 30, 100], device=DEVICE, dtype=torch.int32)
    whole = everything(*x, cu_seqlens=cu_seqlens)
    monkeypatch.setenv("LINATTN_WORKSPACE", "1")
    for ours, expected in zip(everything(*x, cu_seqlens=cu_seqlens), whole, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_sums_that_are_kept_change_no_bit(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And save their kernels in the backward pass."""
    x = [t.requires_grad_() for t in inputs(dtype=torch.bfloat16, heads=2, kv_heads=1, keys=70)]
    runs: list[tuple[Tensor, ...]] = []
    names = {}
    for setting in ("always", "never"):
        monkeypatch.setenv("LINATTN_KEEP_SUMS", setting)
        out = chunked(is_causal=is_causal, enable_gqa=True)(*x)
        loss = out.float().square().sum()
        names[setting] = launched(lambda loss=loss: runs.append(torch.autograd.grad(loss, x)), monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    of_sums = ["pair_sums", "record_sums", "scan_sums"]
    after = [*of_sums, "pull_folded_keys", "pull_folded_keys", "pull_lost_rows"]
    assert names["always"] == ["share_rows", "pull_rows", *after]
    assert names["never"] == ["share_rows", *of_sums, "pull_rows", *after]


def test_description_counts_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.quadratic.gpu import describe

    q = torch.empty(1, 8, 65536, 64, dtype=torch.bfloat16, device="meta")
    with as_architecture("sm_90"):
        assert "4 launches forward, 8 backward (sums kept)" in describe(q, q, q, True, "chunked")
        monkeypatch.setenv("LINATTN_KEEP_SUMS", "never")
        assert "4 launches forward, 11 backward (sums made again)" in describe(q, q, q, True, "chunked")
        monkeypatch.setenv("LINATTN_WORKSPACE", "1")
        assert "in 8 groups of heads" in describe(q, q, q, True, "chunked")


def test_rule_for_keeping_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that takes less time than to make them again, beside q, k, v and out that are not much smaller."""
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.quadratic.gpu import memory
    from linattn.kernels.quadratic.gpu.call import Call

    def kept(D: int, N: int = 65536, chunk: int = 0) -> bool:
        q = torch.empty(1, 8, N, D, dtype=torch.bfloat16, device="meta")
        options, plan = Options(True, 0, 1.0, 1.0, 2.0, 1.0, True), Plan("chunked", "triton", chunk)
        with as_architecture("sm_90"):
            return memory.keeps_sums(Call.of(q, q, q, None, None, [], options, plan))

    assert kept(64)  # 1.4 times q, k, v and out
    assert not kept(128)  # 2.5 times
    assert kept(128, chunk=2048)
    assert not kept(64, chunk=256)  # 128 flops a byte, twice: less than the chip's 184
    assert not kept(64, N=2**20)  # beyond the workspace
    monkeypatch.setenv("LINATTN_KEEP_SUMS", "always")
    assert kept(128)
    monkeypatch.setenv("LINATTN_KEEP_SUMS", "never")
    assert not kept(64)


# ---- configurations --------------------------------------------------------------------------------------------------


def rows_of_table() -> list[tuple[str, torch.dtype, int]]:
    if importlib.util.find_spec("triton") is None:
        return []
    from linattn.kernels.quadratic.gpu.config import CONFIGURATIONS

    dtypes = {2: torch.bfloat16, 4: torch.float32}
    return [(name, dtypes[itemsize], size) for name, itemsize, size in CONFIGURATIONS]


@pytest.mark.skipif(not INTERPRETED, reason="other architectures' tiles need not fit this device")
@pytest.mark.parametrize("architecture, dtype, head_size", rows_of_table(), ids=str)
def test_every_row_of_the_table(architecture: str, dtype: torch.dtype, head_size: int) -> None:
    """Chunks as short as tiles allow, and a sequence of little more than one."""
    from linattn.kernels.common.gpu.architecture import as_architecture
    from linattn.kernels.quadratic.gpu import backward, config, forward

    row = config.row(architecture, dtype, head_size)
    chunk = max(row.lost.BLOCK_T, *(x.rows for x in (row.read, row.pull_rows, row.pull_keys, row.pull_values)))
    q, k, v = inputs(dtype=dtype, keys=chunk + 20, head_size=head_size, value_size=16)
    options, plan = Options(True, 0, 1.0, 1.0, 2.0, 1.0, True), Plan("chunked", "triton", 1)
    dout = torch.randn_like(v)
    with as_architecture(architecture):
        out, sums, _, saved = forward(q, k, v, None, None, [], options, False, True, plan)
        gradients = backward(dout, [], q, k, v, out, sums, saved, None, None, [], options, [True] * 4, plan)[:3]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true = truth_quadratic(*leaves, is_causal=True)
    assert_close_to_truth(out, true.detach())
    for ours, expected in zip(gradients, torch.autograd.grad(true, leaves, dout.double()), strict=True):
        assert_close_to_truth(ours, expected, gradient=True)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_run_names_what_can() -> None:
    large = inputs(dtype=torch.float32, keys=3, head_size=160)
    with pytest.raises(linattn.errors.BackendError, match="only in the direct form"):
        chunked()(*large)
    with pytest.raises(linattn.errors.BackendError, match="only in the direct form"):
        chunked(form="direct", return_state=True)(*large)
    with pytest.raises(linattn.errors.BackendError, match="form='chunked'"):
        chunked(form="recurrent", is_causal=True)(*inputs(dtype=torch.float32))
