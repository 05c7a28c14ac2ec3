"""Bad input: one typed error each, which names what was given and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import linattn
from linattn.errors import ArgumentError, BackendError, DeviceError, DtypeError, LinattnError, ShapeError, StateError
from linattn.states import FeatureMapState, QuadraticState
from linattn.testing import make_inputs

Q, K, V = make_inputs(batch=2, heads=4, keys=12, head_size=6, value_size=5, dtype=torch.float32)
Q1, K1, V1 = (t[:1] for t in (Q, K, V))
PUBLIC = {
    "softmax": linattn.softmax_attention,
    "quadratic": linattn.quadratic_attention,
    "linear": linattn.linear_attention,
    "kernel": lambda q, k, v, **options: linattn.kernel_attention(q, k, v, sim=lambda q, k: (q @ k.mT) ** 2, **options),
    "argmax": linattn.argmax_attention,
}
MASKED = {name: PUBLIC[name] for name in ("softmax", "quadratic", "linear")}


def _assert_refuses(
    error: type[LinattnError] | tuple[type[LinattnError], ...], call: Callable[[], Any], *named: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in named:
        assert part in message, f"{part!r} is not named in: {message}"


@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
class TestTensors:
    @pytest.mark.parametrize("position", [0, 1, 2])
    @pytest.mark.parametrize("rank", [2, 3, 5])
    def test_rank(self, function, position: int, rank: int) -> None:
        tensors = [Q, K, V]
        tensors[position] = torch.zeros((2,) * rank)
        _assert_refuses(ShapeError, lambda: function(*tensors), "qkv"[position], str((2,) * rank)[1:-1])

    def test_head_size_of_keys(self, function) -> None:
        _assert_refuses(ShapeError, lambda: function(Q, K[..., :4], V), "6", "4")

    def test_number_of_values(self, function) -> None:
        _assert_refuses(ShapeError, lambda: function(Q, K, V[:, :, :11]), "12", "11")

    def test_batch(self, function) -> None:
        _assert_refuses(ShapeError, lambda: function(Q, K1, V1), "2", "1")
        _assert_refuses(ShapeError, lambda: function(Q, K, V1), "2", "1")

    def test_heads(self, function) -> None:
        _assert_refuses(LinattnError, lambda: function(Q, K[:, :2], V[:, :2]), "4", "2")
        _assert_refuses(LinattnError, lambda: function(Q, K, V[:, :2]), "4", "2")

    def test_no_queries(self, function) -> None:
        _assert_refuses(ShapeError, lambda: function(Q[:, :, :0], K, V), "0")

    def test_no_keys(self, function) -> None:
        _assert_refuses(ShapeError, lambda: function(Q, K[:, :, :0], V[:, :, :0]), "0")

    def test_no_head_size(self, function) -> None:
        _assert_refuses(ShapeError, lambda: function(Q[..., :0], K[..., :0], V), "0")

    def test_mixed_dtypes(self, function) -> None:
        _assert_refuses(DtypeError, lambda: function(Q, K.double(), V), "float32", "float64")
        _assert_refuses(DtypeError, lambda: function(Q.half(), K.half(), V), "float32", "float16")

    def test_integers(self, function) -> None:
        _assert_refuses(DtypeError, lambda: function(Q.int(), K.int(), V.int()), "int32", "float32")

    def test_mixed_devices(self, function) -> None:
        _assert_refuses(DeviceError, lambda: function(Q, K.to("meta"), V), "cpu", "meta")

    def test_not_a_tensor(self, function) -> None:
        _assert_refuses((DtypeError, ArgumentError, ShapeError), lambda: function(Q.numpy(), K, V), "q", "ndarray")


@pytest.mark.parametrize("function", MASKED.values(), ids=MASKED)
class TestOptions:
    @pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
    def test_scale(self, function, scale: float) -> None:
        _assert_refuses(ArgumentError, lambda: function(Q, K, V, scale=scale), "scale", str(scale))

    def test_causal_lengths_without_an_offset(self, function) -> None:
        call = lambda: function(Q[:, :, :5], K, V, is_causal=True)  # noqa: E731
        _assert_refuses((ArgumentError, ShapeError), call, "q_offset", "5", "12")

    def test_heads_that_do_not_divide(self, function) -> None:
        call = lambda: function(Q, K[:, :3], V[:, :3], enable_gqa=True)  # noqa: E731
        _assert_refuses((ShapeError, ArgumentError), call, "4", "3")

    def test_fewer_heads_without_asking_for_them(self, function) -> None:
        _assert_refuses((ShapeError, ArgumentError), lambda: function(Q, K[:, :2], V[:, :2]), "enable_gqa")

    def test_mask_of_another_shape(self, function) -> None:
        for shape in ((2, 11), (1, 12), (12,), (2, 1, 12)):
            mask = torch.ones(shape, dtype=torch.bool)
            _assert_refuses(ShapeError, lambda m=mask: function(Q, K, V, key_mask=m), "key_mask", "12")

    def test_mask_that_is_not_boolean(self, function) -> None:
        _assert_refuses(
            DtypeError, lambda: function(Q, K, V, key_mask=torch.ones(2, 12)), "key_mask", "bool", "float32"
        )

    def test_mask_on_another_device(self, function) -> None:
        mask = torch.ones(2, 12, dtype=torch.bool, device="meta")
        _assert_refuses(DeviceError, lambda: function(Q, K, V, key_mask=mask), "key_mask", "meta", "cpu")

    @pytest.mark.parametrize(
        ("bounds", "named"),
        [
            ([0, 8, 4, 12], "8"),
            ([0, 5, 13], "13"),
            ([0, 5], "5"),
            ([1, 5, 12], "1"),
            ([-1, 12], "-1"),
            ([0], "cu"),
            ([], "cu"),
        ],
    )
    def test_bounds_of_packed_sequences(self, function, bounds: list[int], named: str) -> None:
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        _assert_refuses(
            (ArgumentError, ShapeError), lambda: function(Q1, K1, V1, cu_seqlens=cu_seqlens), "cu_seqlens", named
        )

    def test_bounds_that_are_not_integers_of_one_dimension(self, function) -> None:
        call = lambda c: function(Q1, K1, V1, cu_seqlens=c)  # noqa: E731
        _assert_refuses((DtypeError, ArgumentError), lambda: call(torch.tensor([0.0, 12.0])), "cu_seqlens", "int32")
        _assert_refuses((ShapeError, ArgumentError), lambda: call(torch.tensor([[0, 12]])), "cu_seqlens")

    def test_packed_sequences_need_a_batch_of_one(self, function) -> None:
        call = lambda: function(Q, K, V, cu_seqlens=torch.tensor([0, 12]))  # noqa: E731
        _assert_refuses((ShapeError, ArgumentError), call, "cu_seqlens", "2")

    def test_packed_queries_and_keys_share_their_bounds(self, function) -> None:
        call = lambda: function(Q1[:, :, :5], K1, V1, cu_seqlens=torch.tensor([0, 12]))  # noqa: E731
        _assert_refuses((ShapeError, ArgumentError), call, "cu_seqlens", "5", "12")

    def test_backend(self, function) -> None:
        _assert_refuses(BackendError, lambda: function(Q, K, V, backend="refrence"), "refrence", "'reference'")


@pytest.mark.parametrize("function", [linattn.quadratic_attention, linattn.linear_attention])
class TestFormsAndStates:
    def test_form(self, function) -> None:
        _assert_refuses(
            ArgumentError, lambda: function(Q, K, V, form="chunkd"), "chunkd", "chunked", "direct", "Did you"
        )

    def test_recurrent_without_causality(self, function) -> None:
        _assert_refuses(ArgumentError, lambda: function(Q, K, V, form="recurrent"), "recurrent", "is_causal")

    def test_a_state_of_another_shape(self, function) -> None:
        _, state = function(Q, K, V, is_causal=True, return_state=True)
        for batch, heads, head_size, value_size in ((2, 4, 7, 5), (2, 4, 6, 4), (2, 3, 6, 5), (3, 4, 6, 5)):
            other = make_inputs(
                batch=batch, heads=heads, keys=3, head_size=head_size, value_size=value_size, dtype=torch.float32
            )
            _assert_refuses(
                StateError, lambda o=other: function(*o, is_causal=True, initial_state=state), "initial_state"
            )

    def test_a_state_of_another_number_of_sequences(self, function) -> None:
        _, state = function(Q, K, V, is_causal=True, return_state=True)
        bounds = torch.tensor([0, 3, 6, 12])
        call = lambda: function(Q1, K1, V1, is_causal=True, cu_seqlens=bounds, initial_state=state)  # noqa: E731
        _assert_refuses(StateError, call, "3", "2")

    def test_a_state_of_another_dtype(self, function) -> None:
        _, state = function(Q, K, V, is_causal=True, return_state=True)
        doubled = type(state)(state.n, *(t.double() for t in state[1:]))
        call = lambda: function(Q, K, V, is_causal=True, initial_state=doubled)  # noqa: E731
        _assert_refuses((StateError, DtypeError), call, "float64", "float32")

    def test_a_state_on_another_device(self, function) -> None:
        _, state = function(Q, K, V, is_causal=True, return_state=True)
        moved = type(state)(*(t.to("meta") for t in state))
        call = lambda: function(Q, K, V, is_causal=True, initial_state=moved)  # noqa: E731
        _assert_refuses((StateError, DeviceError), call, "meta", "cpu")

    def test_something_that_is_no_state(self, function) -> None:
        for wrong in (torch.zeros(3), (Q, K), "state"):
            _assert_refuses(
                (StateError, ArgumentError),
                lambda w=wrong: function(Q, K, V, is_causal=True, initial_state=w),
                "initial_state",
                type(wrong).__name__,
            )


def test_the_state_of_another_operation() -> None:
    _, quadratic = linattn.quadratic_attention(Q, K, V, is_causal=True, return_state=True)
    _, features = linattn.linear_attention(Q, K, V, is_causal=True, return_state=True)
    assert isinstance(quadratic, QuadraticState)
    assert isinstance(features, FeatureMapState)
    named = ("QuadraticState", "FeatureMapState")
    _assert_refuses(StateError, lambda: linattn.quadratic_attention(Q, K, V, initial_state=features), *named)
    _assert_refuses(StateError, lambda: linattn.linear_attention(Q, K, V, initial_state=quadratic), *named)


@pytest.mark.parametrize("coefficients", [(0, 1, 0.1), (1, 2, 0.5), (1, 1, -1), (-1, 0, 1), (0.9, 2, 1)])
def test_a_similarity_that_may_be_negative_cannot_be_normalised(coefficients: tuple[float, float, float]) -> None:
    call = lambda **o: linattn.quadratic_attention(Q, K, V, coefficients=coefficients, **o)  # noqa: E731
    _assert_refuses(ArgumentError, call, "negative", "normalize", *map(str, coefficients))
    assert call(normalize=False).isfinite().all()


@pytest.mark.parametrize("coefficients", [(0.1, 0.2, 0.1), (1 / 3, 2 / 3, 1 / 3), (0.7, 1.4, 0.7), (1e-8, 2e-8, 1e-8)])
def test_a_square_is_accepted_at_any_rounding(coefficients: tuple[float, float, float]) -> None:
    expected = linattn.quadratic_attention(Q, K, V)
    actual = linattn.quadratic_attention(Q, K, V, coefficients=coefficients)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_coefficients_without_a_square_belong_to_linear_attention() -> None:
    for normalize in (True, False):
        call = lambda n=normalize: linattn.quadratic_attention(Q, K, V, coefficients=(1, 1, 0), normalize=n)  # noqa: E731
        _assert_refuses(ArgumentError, call, "linear_attention")


@pytest.mark.parametrize("coefficients", [(1, 2), (1, 2, 1, 0), (1, math.nan, 1), (1, math.inf, 1), "abc", 3])
def test_coefficients_that_are_not_three_numbers(coefficients: Any) -> None:
    _assert_refuses(
        ArgumentError, lambda: linattn.quadratic_attention(Q, K, V, coefficients=coefficients), "coefficients"
    )


def test_identity_cannot_be_normalised() -> None:
    _assert_refuses(
        ArgumentError, lambda: linattn.linear_attention(Q, K, V, feature_map="identity"), "identity", "normalize=False"
    )


def test_unknown_names_suggest_the_nearest() -> None:
    _assert_refuses(
        ArgumentError, lambda: linattn.linear_attention(Q, K, V, feature_map="elu1"), "elu1", "'elu+1'", "relu"
    )
    _assert_refuses(
        ArgumentError, lambda: linattn.attention(Q, K, V, kernel="quadratik"), "quadratik", "mean 'quadratic'"
    )
    _assert_refuses(ArgumentError, lambda: linattn.explain(Q, K, V, kernel="sofmax"), "sofmax", "mean 'softmax'")
    with (
        pytest.raises((BackendError, ArgumentError), match=r"refrence.*mean 'reference'"),
        linattn.use_backend("refrence"),
    ):
        pass


def test_a_feature_map_that_is_no_map() -> None:
    _assert_refuses(ArgumentError, lambda: linattn.linear_attention(Q, K, V, feature_map=3), "feature_map", "3")


def test_a_feature_map_that_changes_the_rows() -> None:
    call = lambda: linattn.linear_attention(Q, K, V, feature_map=lambda x: x.flatten(2))  # noqa: E731
    _assert_refuses(ShapeError, call, "feature_map")


def test_a_feature_map_that_returns_no_features() -> None:
    for result in (None, "features"):
        call = lambda r=result: linattn.linear_attention(Q, K, V, feature_map=lambda x: r)  # noqa: E731
        _assert_refuses((ShapeError, DtypeError, ArgumentError), call, "feature_map", type(result).__name__)
    call = lambda: linattn.linear_attention(Q, K, V, feature_map=lambda x: x.double())  # noqa: E731
    _assert_refuses(DtypeError, call, "feature_map", "float64", "float32")


def test_options_of_another_kernel_are_refused() -> None:
    with pytest.raises((LinattnError, TypeError), match="coefficients"):
        linattn.attention(Q, K, V, kernel="softmax", coefficients=(1, 2, 1))


def test_sim_must_be_callable_and_return_a_score_a_pair() -> None:
    _assert_refuses(ArgumentError, lambda: linattn.kernel_attention(Q, K, V, sim="exp"), "sim", "exp")
    call = lambda: linattn.kernel_attention(Q, K, V, sim=lambda q, k: (q @ k.mT).sum(-1))  # noqa: E731
    _assert_refuses(ShapeError, call, "sim", "12")


def test_no_backend_falls_back_when_named() -> None:
    for name in ("torch", "gpu", "cpu"):
        with pytest.raises(BackendError, match=name):
            linattn.quadratic_attention(Q, K, V, backend=name)
        with pytest.raises(BackendError, match=name):
            linattn.linear_attention(Q, K, V, backend=name)


def test_a_refused_call_leaves_the_next_one_alone() -> None:
    before = linattn.quadratic_attention(Q, K, V)
    with pytest.raises(LinattnError):
        linattn.quadratic_attention(Q, K[..., :4], V)
    assert torch.equal(before, linattn.quadratic_attention(Q, K, V))
