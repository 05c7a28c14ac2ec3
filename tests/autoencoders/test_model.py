"""The autoencoder and its objectives: pinned numbers, derivatives, properties, and the errors that bad inputs raise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linattn.autoencoders import (
    AdditiveNoise,
    Autoencoder,
    DenoisingAutoencoder,
    MaskedAutoencoder,
    Masking,
    reconstruction_loss,
)
from linattn.errors import ArgumentError, DeviceError, DtypeError, ShapeError

KINDS = [Autoencoder, DenoisingAutoencoder, MaskedAutoencoder]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- The course's numbers -------------------------------------------------------------------------------------------


def pinned(kind: type[Autoencoder]) -> tuple[Autoencoder, Tensor]:
    torch.manual_seed(2017)
    model = kind(7, [5, 4])
    torch.manual_seed(2022)
    return model, torch.randn(2, 7)


def test_pinned_losses() -> None:
    model, x = pinned(Autoencoder)
    assert model.loss(x).item() == pytest.approx(10.69554, abs=1e-5)
    assert model.loss(x, "sum").item() == pytest.approx(10.69554, abs=1e-5)
    assert model.loss(x, "mean").item() == pytest.approx(1.52793, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (DenoisingAutoencoder, [-0.09830, -0.08394, 0.12659, 0.37466]),
        (MaskedAutoencoder, [-0.09830, -0.22797, 0.00466, 0.38524]),
    ],
)
def test_pinned_weights_after_one_step(kind: type[Autoencoder], expected: list[float]) -> None:
    model, x = pinned(kind)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    model.loss(x).backward()
    optimiser.step()
    weights = next(model.encoder.parameters()).flatten()[2:6]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-5, rtol=0)


# ---- Structure ------------------------------------------------------------------------------------------------------


def test_decoder_mirrors_encoder_and_activations_stand_only_between_layers() -> None:
    model = Autoencoder(9, [7, 5, 3], "tanh")
    assert [type(part) for part in model.encoder] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [type(part) for part in model.decoder] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    linear = [part for half in (model.encoder, model.decoder) for part in half if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features) for part in linear] == [
        (9, 7),
        (7, 5),
        (5, 3),
        (3, 5),
        (5, 7),
        (7, 9),
    ]


def test_one_int_is_a_bottleneck_and_may_exceed_the_input() -> None:
    assert Autoencoder(4, 9).encode(torch.zeros(2, 4)).shape == (2, 9)
    assert Autoencoder(4, (3, 9)).code_size == 9


def test_identity_makes_a_linear_model() -> None:
    torch.manual_seed(0)
    model = Autoencoder(6, [5, 3], "identity", dtype=torch.float64)
    a, b = torch.randn(2, 4, 6, dtype=torch.float64)
    zero = model(torch.zeros_like(a))
    torch.testing.assert_close(model(a + 2 * b) - zero, (model(a) - zero) + 2 * (model(b) - zero))


@pytest.mark.parametrize("activation", [nn.SiLU, lambda: nn.LeakyReLU(0.2)])
def test_a_function_making_a_module_may_be_the_activation(activation: object) -> None:
    model = Autoencoder(6, [5, 3], activation)
    assert isinstance(model.encoder[1], (nn.SiLU, nn.LeakyReLU))
    assert model.encoder[1] is not model.decoder[1]


# ---- Objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_taken_from_the_corrupted_input_against_the_clean_one(kind: type[Autoencoder], reduction: str) -> None:
    torch.manual_seed(0)
    model = kind(6, [5, 3])
    x = torch.randn(8, 6)
    corrupted = {
        Autoencoder: lambda g: x,
        DenoisingAutoencoder: lambda g: x + 0.5 * torch.randn(8, 6, generator=g),
        MaskedAutoencoder: lambda g: x * (torch.rand(8, 6, generator=g) > 0.25),
    }[kind](seeded(3))
    squares = (model(corrupted) - x).square()
    expected = squares.sum(1).mean() if reduction == "sum" else squares.sum() / 48
    torch.testing.assert_close(model.loss(x, reduction, seeded(3)), expected)
    torch.testing.assert_close(model.eval().loss(x, reduction, seeded(3)), expected)
    assert torch.equal(model(x), model(x))


def test_corruption_is_a_part_that_can_be_exchanged() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    masked = MaskedAutoencoder(6, [5, 3], probability=0.5, fill_value=-2.0)
    other = Autoencoder(6, [5, 3], corruption=Masking(0.5, -2.0))
    other.load_state_dict(masked.state_dict())
    assert torch.equal(masked.loss(x, generator=seeded(1)), other.loss(x, generator=seeded(1)))
    other.corruption = None
    torch.testing.assert_close(other.loss(x), reconstruction_loss(masked(x), x))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    probability=st.sampled_from([0.0, 0.25, 0.9]),
    fill=st.sampled_from([0.0, -1.5, 3.0]),
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_masking_changes_entries_to_the_fill_value_and_nothing_else(
    probability: float, fill: float, shape: list[int], dtype: torch.dtype
) -> None:
    x = torch.rand(shape, dtype=torch.float64).to(dtype) + 5
    before = x.clone()
    got = Masking(probability, fill)(x, seeded(0))
    assert torch.equal(x, before)
    assert got.dtype == dtype
    dropped = got == fill
    assert torch.equal(got, torch.where(dropped, fill, x))
    # Seven standard deviations of the count of dropped entries.
    spread = 7 * (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(dropped.double().mean().item() - probability) <= spread + 1e-12


def test_masking_stops_nan_where_multiplying_would_not() -> None:
    x = torch.full((1000,), float("nan"))
    got = Masking(0.5, 1.0)(x, seeded(0))
    assert 400 < got.eq(1.0).sum().item() < 600


def test_noise_has_the_given_deviation_and_is_drawn_anew() -> None:
    noise = AdditiveNoise(0.5)
    x = torch.zeros(100_000)
    first, second = noise(x), noise(x)
    assert first.std().item() == pytest.approx(0.5, rel=0.02)
    assert first.mean().item() == pytest.approx(0.0, abs=0.01)
    assert abs((first * second).mean().item()) < 0.01
    assert torch.equal(AdditiveNoise(0.0)(x), x)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(kind=st.sampled_from(KINDS), order=st.permutations(range(5)))
def test_samples_do_not_see_each_other(kind: type[Autoencoder], order: list[int]) -> None:
    torch.manual_seed(0)
    model = kind(6, [5, 3], dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(model.encode(x[order]), model.encode(x)[order])
    torch.testing.assert_close(model(x[order]), model(x)[order])
    torch.testing.assert_close(model(x.view(5, 1, 6)), model(x).view(5, 1, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: type[Autoencoder]) -> None:
    torch.manual_seed(0)
    model = kind(4, [3, 2], "tanh", dtype=torch.float64)
    names = list(dict(model.named_parameters()))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.loss(x, generator=seeded(0))

    def objective(x: Tensor, *values: Tensor) -> Tensor:
        given = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Objective(), given, (x,))

    assert torch.autograd.gradcheck(objective, (x, *model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: type[Autoencoder]) -> None:
    torch.manual_seed(0)
    model, x = kind(6, [5, 3]), torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(x, generator=seeded(0))
    torch.testing.assert_close(low, model.loss(x, generator=seeded(0)), rtol=2e-2, atol=0)


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: Autoencoder(0, [3]),
            ArgumentError,
            "input_size is no count; given: 0; accepted: an int of at least 1",
        ),
        (lambda: Autoencoder(7, []), ArgumentError, "at least one size"),
        (lambda: Autoencoder(7, 0), ArgumentError, "hidden_sizes .* given: 0"),
        (lambda: Autoencoder(7, [5, -1]), ArgumentError, "hidden_sizes .* given: -1"),
        (lambda: Autoencoder(7, 2.5), ArgumentError, "hidden_sizes .* given: 2.5"),
        (lambda: Autoencoder(7, [5, True]), ArgumentError, "given: True"),
        (lambda: Autoencoder(7, [5], "rleu"), ArgumentError, "Did you mean 'relu'"),
        (lambda: Autoencoder(7, [5], nn.ReLU()), ArgumentError, "function making a module"),
        (lambda: Autoencoder(7, [5], None), ArgumentError, "given: None"),
        (lambda: MaskedAutoencoder(7, [5], probability=1.0), ArgumentError, r"given: 1\.0; accepted: .* \[0, 1\)"),
        (lambda: MaskedAutoencoder(7, [5], probability=-0.1), ArgumentError, "given: -0.1"),
        (lambda: Masking(float("nan")), ArgumentError, "given: nan"),
        (lambda: Masking(0.5, float("inf")), ArgumentError, "fill_value .* accepted: a finite number"),
        (lambda: DenoisingAutoencoder(7, [5], noise_std=-1.0), ArgumentError, "std .* given: -1.0"),
        (lambda: Masking()(torch.ones(3, dtype=torch.int64)), DtypeError, "int64"),
        (lambda: AdditiveNoise()(torch.ones(3, dtype=torch.int64)), DtypeError, "int64"),
        (
            lambda: Masking()(torch.ones(3, device="meta"), seeded(0)),
            DeviceError,
            "generator .* given: cpu; accepted: meta",
        ),
        (lambda: reconstruction_loss(torch.ones(2, 3), torch.ones(2, 3), "sums"), ArgumentError, "Did you mean 'sum'"),
        (lambda: reconstruction_loss(torch.ones(2, 3), torch.ones(3)), ShapeError, r"\[2, 3\] and \[3\]"),
        (lambda: Autoencoder(3, 2).loss(torch.ones(0, 3)), ShapeError, "non-empty"),
        (
            lambda: Autoencoder(3, 2)(torch.ones(2, 4)),
            ShapeError,
            r"x has the wrong shape; given: \[2, 4\]; accepted: \[..., 3\]",
        ),
        (lambda: Autoencoder(3, 2)(torch.tensor(1.0)), ShapeError, r"given: \[\]"),
        (
            lambda: Autoencoder(3, 2).decode(torch.ones(2, 3)),
            ShapeError,
            r"code has the wrong shape; .* accepted: \[..., 2\]",
        ),
        (lambda: MaskedAutoencoder(3, 2).loss(torch.ones(2, 4)), ShapeError, r"given: \[2, 4\]"),
        (lambda: Autoencoder(3, 2)(torch.ones(2, 3).double()), DtypeError, "float64; accepted: torch.float32"),
        (lambda: Autoencoder(3, 2)(torch.ones(2, 3, device="meta")), DeviceError, "x is on another device .* meta"),
        (lambda: Autoencoder(3, 2).encode([[1.0, 2.0, 3.0]]), ArgumentError, "given: list"),
    ],
)
def test_bad_input(build: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
