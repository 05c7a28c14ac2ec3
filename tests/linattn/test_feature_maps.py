"""The catalogue of feature maps: each is its formula, says truly whether it is positive and how large, and works by
name wherever a kernel can be named."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import linattn
from linattn import feature_maps
from linattn.errors import ArgumentError
from linattn.feature_maps import CATALOGUE, NAMES, POSITIVE, Favor, Hedgehog, dpfp, make
from linattn.kernels.feature_map.maps import MAPS
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.modules import Attention
from linattn.testing import assert_close_to_truth, make_inputs, relative_error, truth_linear, truth_quadratic

LEARNS = {"favor+", "hedgehog"}


def test_the_catalogue_is_complete() -> None:
    expected = {"elu+1", "relu", "relu2", "exp", "identity", "softmax-features", "dpfp", "quadratic-features"}
    assert set(NAMES) == expected | {"taylor-features"} | LEARNS
    assert set(NAMES) - POSITIVE == {"identity"}
    assert {name for name, entry in CATALOGUE.items() if entry.function is None} == LEARNS
    assert set(MAPS) < set(NAMES)
    assert all(f"    {name}" in feature_maps.__doc__ or f"{name}," in feature_maps.__doc__ for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(D=st.integers(1, 9), seed=st.integers(0, 99))
def test_size_and_sign_are_as_stated(name: str, D: int, seed: int) -> None:
    phi = make(name, D)
    q, k = 2 * torch.randn(2, 50, D, generator=torch.Generator().manual_seed(seed))
    assert phi(q).shape == (50, CATALOGUE[name].size(D)) == (50, phi.size)
    assert phi.positive is (name in POSITIVE)
    similarity = (phi(q.double()) @ phi(k.double()).mT).detach()
    if phi.positive:
        assert similarity.min() >= -1e-9
    elif D > 1:
        assert similarity.min() < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_shape_are_kept(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 8).to(dtype)
    out = make(name, 8)(x)
    assert out.dtype == dtype
    assert out.shape[:-1] == x.shape[:-1]
    assert_close_to_truth(out.detach(), make(name, 8)(x.double()).detach())


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_polynomial_maps_are_their_kernels_exactly(scale: float) -> None:
    q, k = torch.randn(2, 30, 7, dtype=torch.float64)
    s = scale * q @ k.mT
    maps = {
        (1, 2, 1): lambda x: feature_maps.quadratic_features(x, scale),
        (1, 1, 0.5): lambda x: feature_maps.taylor_features(x, scale),
    }
    for (c0, c1, c2), phi in maps.items():
        assert phi(q).shape[-1] == linattn.cost.feature_count(7)
        assert relative_error(phi(q) @ phi(k).mT, c0 + c1 * s + c2 * s * s) < 1e-14


def test_taylor_features_are_the_taylor_kernel() -> None:
    q, k, v = make_inputs(keys=40, head_size=6)
    by_map = linattn.attention(q, k, v, kernel="taylor-features", is_causal=True)
    assert_close_to_truth(by_map, linattn.attention(q, k, v, kernel="taylor", is_causal=True))
    by_map = linattn.linear_attention(q, k, v, feature_map="quadratic-features")
    assert_close_to_truth(by_map, truth_quadratic(q, k, v))


def test_dpfp_is_its_formula() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    r = torch.cat((x.clamp(min=0), (-x).clamp(min=0)), dim=1)
    expected = [r[:, i] * r[:, (i - j) % 6] for j in (1, 2) for i in range(6)]
    assert torch.equal(dpfp(x, nu=2), torch.stack(expected, dim=1))


def test_softmax_features_sum_to_one() -> None:
    x = torch.randn(5, 7)
    assert torch.allclose(feature_maps.softmax_features(x), x.exp() / x.exp().sum(-1, keepdim=True))


@pytest.mark.parametrize("orthogonal", [True, False])
def test_random_features_have_the_right_mean(orthogonal: bool) -> None:
    """Over many draws the mean of phi(q).phi(k) approaches exp(q.k / sqrt D) within five standard errors."""
    generator = torch.Generator().manual_seed(1)
    D = 4
    q, k = torch.randn(2, 6, D, dtype=torch.float64, generator=generator) / 2
    phi = Favor(D, 4, orthogonal=orthogonal, generator=generator).double()
    draws = []
    for _ in range(500):
        phi.redraw(generator)
        draws.append((phi(q) * phi(k)).sum(-1))
    drawn = torch.stack(draws)
    error = (drawn.mean(0) - ((q * k).sum(-1) / math.sqrt(D)).exp()).abs()
    assert (error < 5 * drawn.std(0) / math.sqrt(len(draws))).all()


def test_orthogonal_rows_are_perpendicular_with_gaussian_lengths() -> None:
    phi = Favor(16, 500, generator=torch.Generator().manual_seed(0))
    block = phi.projection[:16]
    cosines = block @ block.T / (block.norm(dim=1)[:, None] * block.norm(dim=1))
    assert torch.allclose(cosines, torch.eye(16), atol=1e-5)
    lengths = phi.projection.square().sum(1)
    assert abs(lengths.mean() - 16) < 1.5
    assert lengths.std() > 2
    free = Favor(16, 500, orthogonal=False)
    assert (free.projection[:16] @ free.projection[:16].T).fill_diagonal_(0).abs().max() > 1


def test_redraw_changes_the_features_and_a_generator_repeats_them() -> None:
    phi, x = Favor(8), torch.randn(3, 8)
    first = phi(x)
    phi.redraw(torch.Generator().manual_seed(5))
    second = phi(x)
    assert not torch.allclose(first, second)
    assert torch.equal(Favor(8, generator=torch.Generator().manual_seed(5))(x), second)
    assert torch.equal(Favor(8)(x), first)
    assert "projection" in phi.state_dict()
    assert not list(phi.parameters())


def test_hedgehog_begins_as_softmax_of_both_signs_and_learns() -> None:
    phi, x = Hedgehog(4), torch.randn(3, 4)
    assert torch.allclose(phi(x), torch.cat((x, -x), -1).softmax(-1))
    phi(x).square().sum().backward()
    assert phi.weight.grad.abs().sum() > 0
    rows = Hedgehog(4, features=6).weight
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("name", sorted(POSITIVE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_name_works_in_linear_attention(name: str, dtype: torch.dtype) -> None:
    q, k, v = make_inputs(keys=40, head_size=6, dtype=dtype)
    phi = make(name, 6).double().requires_grad_(False)
    truth = truth_linear(q, k, v, feature_map=phi, is_causal=True)
    assert_close_to_truth(linattn.linear_attention(q, k, v, feature_map=name, is_causal=True), truth)
    assert_close_to_truth(linattn.attention(q, k, v, kernel=name, is_causal=True), truth)
    assert linattn.explain(q, k, v, kernel=name, is_causal=True).op == "feature_map"


@pytest.mark.parametrize("name", sorted(POSITIVE))
def test_every_name_works_in_models(name: str) -> None:
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(vocabulary=7, layers=1, dim=8, heads=2, kernel=name))
    tokens = torch.randint(7, (2, 9))
    model.loss(tokens).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 7
    assert torch.allclose(model(tokens)[:, :6], model(changed)[:, :6], atol=1e-5)


def test_maps_that_learn_belong_to_their_layer() -> None:
    first, second = Attention(8, 2, kernel="hedgehog"), Attention(8, 2, kernel="hedgehog")
    assert first.kernel is not second.kernel
    x = torch.randn(1, 5, 8)
    assert "kernel.weight" in dict(first.named_parameters())
    assert "kernel.projection" in Attention(8, 2, kernel="favor+").state_dict()
    first(x).square().sum().backward()
    assert first.kernel.weight.grad.abs().sum() > 0
    alone = linattn.linear_attention(*[torch.randn(1, 2, 5, 4)] * 3, feature_map="hedgehog")
    assert alone.requires_grad is False


def test_favor_approaches_softmax_attention() -> None:
    q, k, v = make_inputs(keys=64, head_size=8, score_std=1.0)
    softmax = linattn.softmax_attention(q, k, v)
    errors = []
    for features in (16, 256, 4096):
        phi = Favor(8, features).double()
        errors.append(relative_error(linattn.linear_attention(q, k, v, feature_map=phi), softmax))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("name", ["dpfp", "favor+", "taylor-features"])
def test_named_maps_compile_without_a_break(name: str) -> None:
    _q, _k, _v = make_inputs(keys=20, head_size=6, dtype=torch.float32)
    layer = Attention(12, 2, kernel=name, is_causal=True)
    x = torch.randn(1, 9, 12)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("dfpf", 4), "unknown feature map 'dfpf'.*Did you mean 'dpfp'"),
        (
            lambda: linattn.linear_attention(*[torch.ones(1, 1, 2, 2)] * 3, feature_map="favor"),
            "Did you mean 'favor\\+'",
        ),
        (lambda: Favor(4, 0), "features=0"),
        (lambda: Hedgehog(4, 5), "features=5; accepted: .*features even"),
    ],
)
def test_bad_names_and_sizes_are_refused(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()
