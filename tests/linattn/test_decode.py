"""Decoding caches: prompt and steps must give what the whole sequence gives, for every kernel and in every mode."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import linattn
from linattn import DecodeCache, cost
from linattn.errors import ArgumentError, LinattnError, ShapeError, StateError
from linattn.feature_maps import Favor, make
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.testing import (
    assert_close_to_truth,
    make_inputs,
    truth_attention,
    truth_linear,
    truth_quadratic,
    truth_softmax,
)

D = 6
SCALE = 0.7


def _truth_of_map(name: str) -> Callable[..., Tensor]:
    phi = make(name, D).double().requires_grad_(False)
    return lambda q, k, v, **options: truth_linear(q, k, v, feature_map=phi, **options)


TRUTHS: dict[str, Callable[..., Tensor]] = {
    "softmax": truth_softmax,
    "quadratic": truth_quadratic,
    "taylor": lambda q, k, v, **options: truth_quadratic(q, k, v, coefficients=(1, 1, 0.5), **options),
    "elu+1": truth_linear,
    "dpfp": _truth_of_map("dpfp"),
    "favor+": _truth_of_map("favor+"),
    "hedgehog": _truth_of_map("hedgehog"),
    "softmax-features": _truth_of_map("softmax-features"),
}
POLYNOMIAL = ("quadratic", "taylor")


def pieces_of(x: Tensor, cuts: list[int]) -> list[Tensor]:
    bounds = [0, *sorted(cuts), x.shape[2]]
    return [x[:, :, a:b] for a, b in itertools.pairwise(bounds) if b > a]


def decode(cache: DecodeCache, q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> Tensor:
    return torch.cat([cache(*piece) for piece in zip(*(pieces_of(x, cuts) for x in (q, k, v)), strict=True)], dim=2)


def steps_after(prompt: int, T: int) -> list[int]:
    return list(range(prompt, T))


def assert_same_cache(a: DecodeCache, b: DecodeCache, q: Tensor, k: Tensor, v: Tensor) -> None:
    assert torch.equal(a.seen, b.seen)
    assert a.nbytes > 0
    assert torch.equal(a(q, k, v), b(q, k, v))


@given(
    kernel=st.sampled_from(sorted(TRUTHS)),
    cuts=st.lists(st.integers(1, 39), max_size=8),
    fold_at=st.sampled_from([None, 1, 2, 20, 39]),
    capacity=st.sampled_from([None, 40, 50]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(kernel="softmax", cuts=list(range(1, 40)), fold_at=None, capacity=None, heads=(2, 1), dtype=torch.float32)
@example(kernel="softmax", cuts=list(range(1, 40)), fold_at=None, capacity=40, heads=(2, 1), dtype=torch.float32)
@example(kernel="quadratic", cuts=list(range(1, 40)), fold_at=20, capacity=None, heads=(2, 1), dtype=torch.float32)
@example(kernel="quadratic", cuts=list(range(1, 40)), fold_at=20, capacity=40, heads=(2, 1), dtype=torch.float32)
@example(kernel="taylor", cuts=list(range(1, 40)), fold_at=None, capacity=40, heads=(2, 1), dtype=torch.float32)
@example(kernel="elu+1", cuts=list(range(1, 40)), fold_at=None, capacity=40, heads=(2, 1), dtype=torch.float32)
def test_any_pieces_give_the_whole(
    kernel: str,
    cuts: list[int],
    fold_at: int | None,
    capacity: int | None,
    heads: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    q, k, v = make_inputs(keys=40, heads=heads[0], kv_heads=heads[1], head_size=D, value_size=5, dtype=dtype)
    fold = {"fold_at": fold_at} if kernel in POLYNOMIAL else {}
    cache = DecodeCache.of(kernel, capacity=capacity, scale=SCALE, enable_gqa=True, **fold)
    out = decode(cache, q, k, v, cuts)
    assert_close_to_truth(out, TRUTHS[kernel](q, k, v, is_causal=True, scale=SCALE))
    assert cache.seen.tolist() == [40, 40]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
@pytest.mark.parametrize("capacity", [None, 40])
def test_low_precision(kernel: str, capacity: int | None, dtype: torch.dtype) -> None:
    q, k, v = make_inputs(keys=40, head_size=16, dtype=dtype)
    fold = {"fold_at": 30} if kernel == "quadratic" else {}
    out = decode(DecodeCache.of(kernel, capacity=capacity, scale=SCALE, **fold), q, k, v, steps_after(20, 40))
    assert out.dtype == dtype
    assert_close_to_truth(out, TRUTHS[kernel](q, k, v, is_causal=True, scale=SCALE))


@pytest.mark.parametrize("kernel", POLYNOMIAL)
def test_the_fold_is_exact_and_frees_the_keys(kernel: str) -> None:
    """In float64 the state that a fold leaves is that of all keys at once, and memory stops growing."""
    q, k, v = make_inputs(keys=60, head_size=D, value_size=5)
    cache = DecodeCache.of(kernel, fold_at=40, scale=SCALE)
    held = []
    for t in range(60):
        cache(*(x[:, :, t : t + 1] for x in (q, k, v)))
        held.append(cache.nbytes)
        assert (cache.k is None) == (t + 1 >= 40)
    _, whole = linattn.quadratic_attention(q, k, v, is_causal=True, return_state=True)
    for name, mine, expected in zip(whole._fields, cache.sums.state, whole, strict=True):
        assert_close_to_truth(mine.double(), expected.double(), dtype=torch.float64, what=name)
    assert len(set(held[39:])) == 1
    sums = sum(x[0].numel() for x in whole[1:]) * 2 * 8  # two sequences of float64
    assert held[-1] == sums + 3 * 2 * 8  # and n, and what both caches have seen


def test_folding_begins_where_the_cost_model_says() -> None:
    q, k, v = make_inputs(batch=1, heads=1, keys=80, head_size=8, dtype=torch.float32)
    expected = cost.fold_length(8)
    assert 2 * 4 * cost.state_size("quadratic", 8, 8) == expected * 4 * 16
    cache = DecodeCache.of("quadratic", scale=SCALE)
    folded = []
    for t in range(80):
        cache(*(x[:, :, t : t + 1] for x in (q, k, v)))
        folded.append(cache.k is None)
    assert folded.index(True) + 1 == -(-expected // 1)
    prompt = DecodeCache.of("quadratic", scale=SCALE)
    prompt(q, k, v)
    assert prompt.k is None


def test_memory_grows_for_softmax_only() -> None:
    q, k, v = make_inputs(batch=1, keys=300, head_size=8, dtype=torch.float32)
    held: dict[str, list[int]] = {}
    for kernel in ("softmax", "quadratic", "elu+1"):
        cache = DecodeCache.of(kernel, scale=SCALE)
        held[kernel] = []
        for t in range(0, 300, 10):
            cache(*(x[:, :, t : t + 10] for x in (q, k, v)))
            held[kernel].append(cache.nbytes)
    assert len(set(held["elu+1"])) == 1
    assert len(set(held["quadratic"][10:])) == 1
    assert held["softmax"][-1] > 4 * held["softmax"][0]
    assert held["softmax"][-1] >= 2 * 300 * 8 * 2 * 4


@given(
    kernel=st.sampled_from(["softmax", "quadratic", "taylor", "elu+1", "favor+"]),
    capacity=st.sampled_from([None, 64]),
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    fold_at=st.sampled_from([4, 17, 40]),
    left=st.booleans(),
)
@example(kernel="quadratic", capacity=None, lengths=[3, 12], fold_at=17, left=True)
@example(kernel="quadratic", capacity=64, lengths=[3, 12], fold_at=17, left=False)
@example(kernel="softmax", capacity=64, lengths=[1, 5], fold_at=4, left=True)
def test_a_batch_of_different_lengths_is_its_sequences(
    kernel: str, capacity: int | None, lengths: list[int], fold_at: int, left: bool
) -> None:
    """Padding on either side, with NaN in it; then steps that some sequences sit out."""
    longest, after = max(lengths), 14
    q, k, v = make_inputs(batch=len(lengths), keys=longest + after, head_size=D, value_size=5, dtype=torch.float32)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(longest - length, None) if left else slice(length)] = True
    fold = {"fold_at": fold_at} if kernel in POLYNOMIAL else {}
    cache = DecodeCache.of(kernel, capacity=capacity, scale=SCALE, **fold)
    hidden = ~mask[:, None, :, None]
    prompt = (q[:, :, :longest], *(x[:, :, :longest].masked_fill(hidden, torch.nan) for x in (k, v)))
    outputs = [cache(*prompt, key_mask=mask)]
    outputs.extend(cache(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(longest, longest + after))
    out = torch.cat(outputs, dim=2)
    assert cache.seen.tolist() == [length + after for length in lengths]
    real = torch.cat((mask, torch.ones(len(lengths), after, dtype=torch.bool)), dim=1)
    for row in range(len(lengths)):
        alone = [x[row : row + 1, :, real[row]] for x in (q, k, v)]
        truth = TRUTHS[kernel](*alone, is_causal=True, scale=SCALE)
        assert_close_to_truth(out[row : row + 1, :, real[row]], truth, what=f"row {row}")


@given(
    kernel=st.sampled_from(sorted(TRUTHS)),
    capacity=st.sampled_from([None, 40]),
    index=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    prompt=st.integers(1, 25),
)
@example(kernel="softmax", capacity=None, index=[2, 0, 0], prompt=9)
@example(kernel="quadratic", capacity=None, index=[2, 0, 0], prompt=25)
@example(kernel="quadratic", capacity=40, index=[2, 0, 0], prompt=25)
def test_reordered_sequences_go_on_as_those_they_came_from(
    kernel: str, capacity: int | None, index: list[int], prompt: int
) -> None:
    q, k, v = make_inputs(batch=3, keys=32, head_size=D, value_size=5, dtype=torch.float32)
    fold = {"fold_at": 20} if kernel in POLYNOMIAL else {}
    cache = DecodeCache.of(kernel, capacity=capacity, scale=SCALE, **fold)
    cache(*(x[:, :, :prompt] for x in (q, k, v)))
    cache.reorder(torch.tensor(index))
    out = decode(cache, *(x[:, :, prompt:] for x in (q, k, v)), steps_after(1, 32 - prompt))
    joined = [torch.cat((x[index, :, :prompt], x[:, :, prompt:]), dim=2) for x in (q, k, v)]
    truth = TRUTHS[kernel](*joined, is_causal=True, scale=SCALE)
    assert_close_to_truth(out, truth[:, :, prompt:])


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
def test_one_sequence_becomes_several_beams(kernel: str) -> None:
    q, k, v = make_inputs(batch=1, keys=12, head_size=D, dtype=torch.float32)
    cache = DecodeCache.of(kernel, scale=SCALE)
    cache(*(x[:, :, :10] for x in (q, k, v)))
    cache.reorder(torch.zeros(3, dtype=torch.int64))
    out = cache(*(x[:, :, 10:11].expand(3, -1, -1, -1) for x in (q, k, v)))
    truth = TRUTHS[kernel](*(x[:, :, :11] for x in (q, k, v)), is_causal=True, scale=SCALE)[:, :, 10:]
    assert_close_to_truth(out, truth.expand(3, -1, -1, -1))


@pytest.mark.parametrize("kernel", TRUTHS)
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("prompt", [5, 25])
@pytest.mark.parametrize("padded", [False, True])
def test_saved_and_loaded_caches_go_on_alike(kernel: str, capacity: int | None, prompt: int, padded: bool) -> None:
    q, k, v = make_inputs(keys=30, head_size=D, dtype=torch.float32)
    fold = {"fold_at": 20} if kernel in POLYNOMIAL else {}
    make_cache = lambda: DecodeCache.of(kernel, capacity=capacity, scale=SCALE, **fold)  # noqa: E731
    cache = make_cache()
    mask = torch.ones(2, prompt, dtype=torch.bool)
    mask[0, :3] = not padded
    cache(*(x[:, :, :prompt] for x in (q, k, v)), key_mask=mask if padded else None)
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    again = make_cache()
    again.load_state_dict(torch.load(file))  # weights_only, the default: no code is loaded
    for t in range(prompt, 30):
        assert_same_cache(cache, again, *(x[:, :, t : t + 1] for x in (q, k, v)))


def test_a_saved_cache_holds_no_spare_room() -> None:
    q, k, v = make_inputs(batch=1, keys=3, head_size=D, dtype=torch.float32)
    cache = DecodeCache.of("softmax")
    cache(q, k, v)
    assert cache.k.shape[2] == 64
    assert cache.state_dict()["k"].shape[2] == 3


def test_loading_something_else_is_refused() -> None:
    q, k, v = make_inputs(keys=3, head_size=D, dtype=torch.float32)
    cache = DecodeCache.of("softmax")
    cache(q, k, v)
    saved = cache.state_dict()
    for other in (DecodeCache.of("quadratic"), DecodeCache.of("softmax", capacity=8), DecodeCache.of("elu+1")):
        with pytest.raises(
            StateError, match=r"what is loaded was not saved from such a cache; given: .*; accepted: a cache of"
        ):
            other.load_state_dict(saved)
    with pytest.raises(StateError, match="given: None"):
        cache.load_state_dict({"weight": torch.zeros(3)})


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
def test_fixed_shapes_stay_in_the_same_memory(kernel: str) -> None:
    q, k, v = make_inputs(keys=40, head_size=D, dtype=torch.float32)
    fold = {"fold_at": 20} if kernel == "quadratic" else {}
    cache = DecodeCache.of(kernel, capacity=40, **fold)
    cache(*(x[:, :, :3] for x in (q, k, v)))
    before = [(name, x.data_ptr(), x.shape) for name, x in cache.named_buffers()]
    decode(cache, *(x[:, :, 3:] for x in (q, k, v)), steps_after(1, 37))
    cache.reorder(torch.tensor([1, 0]))
    assert [(name, x.data_ptr(), x.shape) for name, x in cache.named_buffers()] == before


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1", ("elu+1", "softmax")])
def test_a_fixed_step_is_compiled_once(kernel: Any) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(vocabulary=11, layers=2, dim=16, heads=2, kernel=kernel)).eval()
    tokens = torch.randint(11, (2, 30))
    cache = model.decode_cache(capacity=200)  # beyond the length from which the quadratic kernel keeps the state
    outputs = [model(tokens[:, :5], cache=cache)]
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(lambda token, cache: model(token, cache=cache), backend=counter, fullgraph=True)
    with torch.no_grad():
        outputs += [step(tokens[:, t : t + 1], cache) for t in range(5, 30)]
    assert counter.frame_count == 1
    assert_close_to_truth(torch.cat(outputs, dim=1).detach(), model(tokens).detach().double())


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
def test_a_fixed_step_is_exported(kernel: str) -> None:
    class Step(torch.nn.Module):
        def __init__(self, model: CausalLM, cache: torch.nn.Module) -> None:
            super().__init__()
            self.model, self.cache = model, cache

        def forward(self, token: Tensor) -> Tensor:
            return self.model(token, cache=self.cache)

    model = CausalLM(CausalLMConfig(vocabulary=11, layers=2, dim=16, heads=2, kernel=kernel)).eval()
    tokens = torch.randint(11, (1, 12))
    cache = model.decode_cache(capacity=200)
    with torch.no_grad():
        model(tokens[:, :5], cache=cache)
        program = torch.export.export(Step(model, cache), (tokens[:, 5:6],))
        step = program.module()
        outputs = [step(tokens[:, t : t + 1]) for t in range(5, 12)]
        assert_close_to_truth(torch.cat(outputs, dim=1), model(tokens)[:, 5:].double())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1", "hedgehog", ("quadratic", "softmax")])
@pytest.mark.parametrize("capacity", [None, 40])
def test_a_model_decodes_what_it_reads_at_once(kernel: Any, capacity: int | None, side: str) -> None:
    """Rotary positions included: padding takes none, and tokens in the cache come before."""
    torch.manual_seed(0)
    config = CausalLMConfig(vocabulary=11, layers=3, dim=16, heads=4, kv_heads=2, kernel=kernel, qk_norm=True)
    model = CausalLM(config).eval()
    tokens = torch.randint(11, (2, 30))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, slice(0, 4) if side == "left" else slice(6, 10)] = False
    real = torch.cat((mask, torch.ones(2, 20, dtype=torch.bool)), dim=1)
    cache = model.decode_cache(capacity)
    with torch.no_grad():
        outputs = [model(tokens[:, :10], key_mask=mask, cache=cache)]
        outputs += [model(tokens[:, t : t + 1], cache=cache) for t in range(10, 30)]
        out = torch.cat(outputs, dim=1)
        for row in range(2):
            alone = model.double()(tokens[row : row + 1, real[row]])
            model.float()
            assert_close_to_truth(out[row : row + 1, real[row]], alone, dtype=torch.float32)
        assert_close_to_truth(model(tokens, key_mask=real)[1, real[1]], alone[0], dtype=torch.float32)
    assert cache.nbytes == sum(layer.nbytes for layer in cache)


def test_a_model_cache_is_reordered_and_saved() -> None:
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(vocabulary=11, layers=2, dim=16, heads=2, kernel=("elu+1", "softmax"))).eval()
    tokens = torch.randint(11, (3, 9))
    with torch.no_grad():
        cache = model.decode_cache()
        model(tokens[:, :8], cache=cache)
        cache.reorder(torch.tensor([2, 2, 0]))
        again = model.decode_cache()
        again.load_state_dict(cache.state_dict())
        order = torch.cat((tokens[[2, 2, 0], :8], tokens[:, 8:]), dim=1)
        expected = model(order)[:, 8:]
        assert_close_to_truth(model(tokens[:, 8:], cache=cache), expected.double())
        assert_close_to_truth(model(tokens[:, 8:], cache=again), expected.double())


def test_a_feature_map_module_is_no_part_of_what_is_saved() -> None:
    q, k, v = make_inputs(keys=9, head_size=D, dtype=torch.float32)
    phi = Favor(D, 12)
    cache = DecodeCache.of(phi)
    out = decode(cache, q, k, v, [4, 5])
    assert set(cache.state_dict()) == {"seen", "n", "f_sum", "fv", "_extra_state"}
    assert_close_to_truth(out, truth_attention(q, k, v, lambda q, k: phi(q) @ phi(k).mT, is_causal=True), dtype=q.dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "quadratc"}, "unknown kernel 'quadratc'.*Did you mean 'quadratic'"),
        ({"kernel": "softmax", "capacity": 0}, "given: capacity=0; accepted: at least 1"),
        ({"kernel": "quadratic", "fold_at": 0}, "given: fold_at=0; accepted: at least 1"),
        ({"kernel": "softmax", "fold_at": 9}, "kernel 'softmax' never turns keys into a state; given: fold_at=9"),
        ({"kernel": "elu+1", "fold_at": 9}, "kernel 'elu\\+1' never turns keys into a state; given: fold_at=9"),
        (
            {"kernel": "softmax", "is_causal": True},
            "a decoding cache is causal and sets is_causal itself; given: is_causal=True",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DecodeCache.of(**options)


@pytest.mark.parametrize("kernel", ["softmax", "quadratic", "elu+1"])
def test_bad_input_is_named_and_changes_nothing(kernel: str) -> None:
    q, k, v = make_inputs(keys=9, head_size=D, dtype=torch.float32)
    cache = DecodeCache.of(kernel)
    with pytest.raises(StateError, match="before the first tokens"):
        cache.reorder(torch.tensor([0]))
    cache(*(x[:, :, :5] for x in (q, k, v)))
    saved = {name: x.clone() for name, x in cache.state_dict().items() if torch.is_tensor(x)}
    step = [x[:, :, 5:6] for x in (q, k, v)]
    wrong: list[tuple[type[LinattnError], str, Callable[[], object]]] = [
        (StateError, "the cache holds", lambda: cache(*(x[:1] for x in step))),
        (StateError, "the cache holds", lambda: cache(*(x.double() for x in step))),
        (ShapeError, "accepted: \\[B, H, T, D\\]", lambda: cache(*(x[0] for x in step))),
        (StateError, "the cache holds", lambda: cache(step[0], step[1], step[2][..., :2])),
        (
            ShapeError,
            "key_mask must fit the keys; .* accepted: \\[B, T\\] = \\(2, 1\\)",
            lambda: cache(*step, key_mask=torch.ones(2, 6) > 0),
        ),
        (StateError, "accepted: int64 numbers from 0 to 1", lambda: cache.reorder(torch.tensor([0, 2]))),
        (StateError, "accepted: int64 numbers", lambda: cache.reorder(torch.tensor([0.0, 1.0]))),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()
    assert all(torch.equal(cache.state_dict()[name], x) for name, x in saved.items())
    whole = TRUTHS[kernel](
        *(x[:, :, :6] for x in (q, k, v)), is_causal=True, scale=None if kernel == "softmax" else 1.0
    )
    assert_close_to_truth(cache(*step), whole[:, :, 5:])


def test_more_tokens_than_the_capacity_are_refused() -> None:
    q, k, v = make_inputs(keys=9, head_size=D, dtype=torch.float32)
    with pytest.raises(StateError, match="given: 9 tokens; accepted: at most capacity=8"):
        DecodeCache.of("softmax", capacity=8)(q, k, v)
    cache = DecodeCache.of("softmax", capacity=8)
    cache(*(x[:, :, :8] for x in (q, k, v)))
    with pytest.raises(StateError, match="given: 9 tokens"):
        cache(*(x[:, :, 8:] for x in (q, k, v)))
    with pytest.raises(StateError, match="accepted: 2 numbers"):
        cache.reorder(torch.tensor([0]))


def test_a_layer_that_is_not_causal_has_no_cache() -> None:
    with pytest.raises(ArgumentError, match="is_causal=False"):
        linattn.modules.Attention(8, 2).decode_cache()
