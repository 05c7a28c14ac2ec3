"""The convolutional networks of the studies, and the claim of the study of depth at a small size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linattn.bench.studies.networks import accumulation, depth
from linattn.bench.studies.networks.convnets import Block, ConvNet
from linattn.bench.studies.networks.digits import load_digits
from linattn.errors import ArgumentError


@pytest.mark.parametrize("layers", [8, 20, 56])
def test_depth_counts_layers_with_weights(layers: int) -> None:
    net = ConvNet(layers, width=2)
    assert sum(isinstance(part, (nn.Conv2d, nn.Linear)) for part in net.modules()) == layers


@pytest.mark.parametrize("layers", [2, 7, 21, -4])
def test_other_depths_are_refused(layers: int) -> None:
    with pytest.raises(ArgumentError, match=rf"depth={layers} .*6 n \+ 2"):
        ConvNet(layers)


def test_plain_and_residual_have_the_same_weights() -> None:
    shapes = [
        {name: p.shape for name, p in ConvNet(20, residual=residual).named_parameters()} for residual in (True, False)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("outputs", "size"), [(3, 8), (6, 4)])
def test_a_residual_block_of_zero_weights_passes_its_input_on(outputs: int, size: int) -> None:
    x = torch.rand(2, 3, 8, 8)
    for residual in (True, False):
        block = Block(3, outputs, size, residual=residual, norm="batch")
        nn.init.zeros_(block.second.weight)
        kept = block(x)
        assert kept.shape == (2, outputs, size, size)
        expected = x[:, :, :: 8 // size, :: 8 // size] if residual else torch.zeros(2, 3, size, size)
        torch.testing.assert_close(kept[:, :3], expected)
        assert not kept[:, 3:].any()


def test_digits_are_normalised() -> None:
    pytest.importorskip("sklearn", reason="the handwritten digits need scikit-learn")
    digits = load_digits(torch.float64)
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.mean().abs() < 1e-12
    assert abs(digits.images.std() - 1) < 1e-12
    assert digits.labels.bincount().min() > 170


@pytest.mark.slow
def test_the_deeper_plain_network_trains_worse_and_the_deeper_residual_one_does_not() -> None:
    pytest.importorskip("sklearn", reason="the handwritten digits need scikit-learn")
    digits = load_digits()
    wrong = {
        name: depth.train(layers, residual, digits, epochs=3, seed=0).errors[-1]
        for name, layers, residual in (("plain 20", 20, False), ("plain 56", 56, False), ("residual 56", 56, True))
    }
    assert wrong["plain 56"] > wrong["plain 20"] + 0.2, wrong
    assert wrong["residual 56"] < wrong["plain 20"], wrong


def test_claims_of_depth_break_when_the_deeper_residual_network_is_worse() -> None:
    def curve(layers: int, residual: bool, error: float) -> depth.Curve:
        return depth.Curve(layers, residual, 1, [1.0], [error], error)

    as_found = [curve(20, False, 0.03), curve(56, False, 0.7), curve(20, True, 0.0), curve(56, True, 0.001)]
    assert all(claim.holds for claim in depth.claims_of(as_found))
    assert not all(claim.holds for claim in depth.claims_of([*as_found[:3], curve(56, True, 0.05)]))
    assert not all(claim.holds for claim in depth.claims_of([as_found[0], curve(56, False, 0.04), *as_found[2:]]))


def test_means_of_tenths_keep_every_step() -> None:
    assert accumulation.means_of_tenths([1.0] * 9 + [11.0]) == [1.0] * 9 + [11.0]
    assert accumulation.means_of_tenths(list(range(25)))[-1] == sum(range(18, 25)) / 7
    assert accumulation.means_of_tenths([2.0, 4.0]) == [2.0, 4.0]
