"""Causal linear attention is an RNN: step by step, in pieces and at once it is one function, with one state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import linattn
from linattn.errors import ArgumentError, DtypeError, ShapeError, StateError
from linattn.rnn import LinearAttentionLayer, RecurrentRegressionModel

MAPS = ["elu+1", "relu", "relu2", "exp", "dpfp", "quadratic-features"]


def made(feature_map: str = "elu+1", dtype: torch.dtype = torch.float64) -> tuple[LinearAttentionLayer, Tensor]:
    return LinearAttentionLayer(3, 8, 2, feature_map, dtype=dtype), torch.randn(4, 21, 3, dtype=dtype)


def walked(layer: LinearAttentionLayer, x: Tensor) -> tuple[Tensor, linattn.FeatureMapState]:
    state, outputs = None, []
    for x_t in x.unbind(1):
        h, state = layer.step(x_t, state)
        outputs.append(h)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("feature_map", MAPS)
def test_steps_equal_linear_attention_with_state_and_gradients(feature_map: str) -> None:
    layer, x = made(feature_map)
    results = []
    for run in (walked, LinearAttentionLayer.__call__):
        leaf = x.clone().requires_grad_()
        all_h, state = run(layer, leaf)
        gradients = torch.autograd.grad(all_h.square().sum() + state.fv.sum(), (leaf, layer.weight_x))
        results.append((all_h, *state, *gradients))
    torch.testing.assert_close(results[0], results[1])

    q, k, v = (layer.weight_x.view(3, 2, 4, 3) @ x[:, None, None].mT).mT.unbind(1)
    direct = linattn.linear_attention(q, k, v, is_causal=True, feature_map=feature_map, form="direct")
    torch.testing.assert_close(direct.transpose(1, 2).flatten(2), results[0][0])


def test_the_native_kernels_give_the_same() -> None:
    layer, x = made(dtype=torch.float32)
    torch.testing.assert_close(walked(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def test_a_sequence_may_be_cut_anywhere_and_go_on_by_steps() -> None:
    layer, x = made()
    whole, end = layer(x)
    first, state = layer(x[:, :10])
    second, state = layer(x[:, 10:20], state)
    last, state = layer.step(x[:, 20], state)
    torch.testing.assert_close(torch.cat([first, second, last[:, None]], 1), whole)
    torch.testing.assert_close(tuple(state), tuple(end))


def test_it_stands_where_a_recurrent_layer_does() -> None:
    model = RecurrentRegressionModel(LinearAttentionLayer(3, 8))
    predictions, all_h = model(torch.randn(2, 5, 3))
    assert predictions.shape == (2, 5, 1)
    assert all_h.shape == (2, 5, 8)


def test_bad_calls() -> None:
    with pytest.raises(ArgumentError, match="hidden_size=8 and heads=3"):
        LinearAttentionLayer(3, 8, 3)
    with pytest.raises(ArgumentError, match="Did you mean 'elu"):
        LinearAttentionLayer(3, 8, feature_map="elu1")
    layer, x = made()
    with pytest.raises(ShapeError, match=r"given: \[4, 21, 3\]; accepted: \[B, 3\]"):
        layer.step(x, None)
    with pytest.raises(DtypeError, match="float32"):
        layer(x.float())
    with pytest.raises(StateError):
        layer(x, LinearAttentionLayer(3, 8, 1, dtype=torch.float64)(x)[1])
