"""The numbers the course pins for its recurrent networks, tolerance 1e-4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linattn.rnn import LSTM, RNN, LSTMLayer, RecurrentRegressionModel, RNNLayer, running_average_loss, scalar_rnn

DATA = torch.tensor(
    [
        [[0.1, 0.15], [0.2, 0.25], [0.3, 0.35], [0.4, 0.45]],
        [[-0.1, -1.5], [-0.2, -2.5], [-0.3, -3.5], [-0.4, -0.45]],
    ]
)


def constant(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def assert_columns(got: Tensor, rows: list[list[float]]) -> None:
    expected = torch.tensor(rows)[..., None].expand_as(got)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def parameter_count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_parameter_counts() -> None:
    assert parameter_count(RNNLayer(2, 3)) == 18
    assert parameter_count(LSTMLayer(2, 3)) == 72
    assert parameter_count(RecurrentRegressionModel(RNNLayer(2, 3), 4)) == 34


def test_one_step_of_one_unit() -> None:
    _, last_h = constant(RNNLayer(1, 1), 0.1)(torch.ones(1, 1, 1))
    assert last_h.item() == pytest.approx(0.1973753, abs=1e-6)


RNN_TABLE = {
    "identity": [[-0.1250, -0.1075, -0.1328, -0.1452], [0.0600, 0.1520, 0.2344, -0.0853]],
    "tanh": [[-0.1244, -0.1073, -0.1320, -0.1444], [0.0599, 0.1509, 0.2305, -0.0840]],
}


@pytest.mark.parametrize("nonlinearity", RNN_TABLE)
def test_rnn_layer(nonlinearity: str) -> None:
    all_h, last_h = constant(RNNLayer(2, 3, nonlinearity), -0.1)(DATA)
    assert_columns(all_h, RNN_TABLE[nonlinearity])
    assert torch.equal(last_h, all_h[:, -1])


def test_regression() -> None:
    predictions, all_h = constant(RecurrentRegressionModel(RNNLayer(2, 3), 4), -0.1)(DATA)
    assert predictions.shape == (2, 4, 4)
    assert_columns(predictions, [[-0.0627, -0.0678, -0.0604, -0.0567], [-0.1180, -0.1453, -0.1692, -0.0748]])
    assert_columns(all_h, RNN_TABLE["tanh"])


def test_two_layer_rnn() -> None:
    all_h, last_h = constant(RNN(2, 3, 2), -0.1)(DATA)
    assert_columns(all_h, [[-0.0626, -0.0490, -0.0457, -0.0430], [-0.1174, -0.1096, -0.1354, -0.0342]])
    assert_columns(last_h, [[-0.1444, -0.0840], [-0.0430, -0.0342]])


def test_lstm_layer() -> None:
    all_h, (h, c) = constant(LSTMLayer(2, 3), -0.1)(DATA)
    assert_columns(all_h, [[-0.0273, -0.0420, -0.0514, -0.0583], [0.0159, 0.0568, 0.1142, 0.0369]])
    assert_columns(c, [-0.1280, 0.0759])
    assert torch.equal(h, all_h[:, -1])


def test_three_layer_lstm() -> None:
    all_h, (h, c) = constant(LSTM(2, 3, 3), -0.1)(DATA)
    assert_columns(all_h, [[-0.0212, -0.0296, -0.0329, -0.0343], [-0.0211, -0.0291, -0.0320, -0.0332]])
    assert_columns(c, [[-0.1280, 0.0759], [-0.0666, -0.0907], [-0.0716, -0.0693]])
    assert torch.equal(h[-1], all_h[:, -1])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
def test_loss_over_all_steps_and_over_the_last(shape: tuple[int, ...]) -> None:
    predictions = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]).view(shape)
    targets = torch.tensor([[-1.1, -1.2, -1.3], [-1.4, -1.5, -1.6]]).view(shape)
    assert running_average_loss(predictions, targets).item() == pytest.approx(3.0067, abs=1e-4)
    assert running_average_loss(predictions, targets, last_timestep_only=True).item() == pytest.approx(3.7, abs=1e-4)


def test_scalar_worked_example() -> None:
    w, u1, u2, u3 = 0.7, -1.3, 0.4, 2.1
    run = scalar_rnn(w, [u1, u2, u3])
    p, r, t = u1, w * u1 + u2, w * (w * u1 + u2) + u3
    assert run.y == pytest.approx(w**3 * u1 + w**2 * u2 + w * u3)
    assert run.weight_gradient == pytest.approx(3 * w**2 * u1 + 2 * w * u2 + u3)
    assert run.edge_gradients == pytest.approx((w**2 * p, w * r, t))
    assert sum(run.edge_gradients) == pytest.approx(run.weight_gradient)
    assert run.input_gradients == pytest.approx((w**3, w**2, w))


def test_scalar_example_is_an_identity_rnn_with_its_two_weights_tied() -> None:
    layer = RNNLayer(1, 1, "identity", dtype=torch.float64)
    constant(layer, 1.2)
    with torch.no_grad():
        layer.bias.zero_()
    inputs = torch.tensor([0.3, -2.0, 1.5, 0.25, -0.5], dtype=torch.float64, requires_grad=True)
    all_h, last_h = layer(inputs.view(1, 5, 1))
    last_h.sum().backward()

    run = scalar_rnn(1.2, inputs.tolist())
    assert run.states == pytest.approx(all_h.flatten().tolist())
    assert run.weight_gradient == pytest.approx((layer.weight_x.grad + layer.weight_h.grad).item())
    assert run.input_gradients == pytest.approx(inputs.grad.tolist())
