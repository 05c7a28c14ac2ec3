"""Layers and stacks: equality with torch.nn, derivatives, properties, and the errors that bad inputs raise."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from linattn.errors import ArgumentError, DtypeError, ShapeError, StateError
from linattn.rnn import (
    LSTM,
    RNN,
    LSTMLayer,
    RecurrentRegressionModel,
    RNNLayer,
    from_torch_state_dict,
    running_average_batch,
    running_average_loss,
    scalar_rnn,
    to_torch_state_dict,
)

NETS = [RNNLayer, LSTMLayer, RNN, LSTM]


def make(kind: type, input_size: int, hidden_size: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    depth = {"num_layers": 2} if kind in (RNN, LSTM) else {}
    return kind(input_size, hidden_size, dtype=dtype, **depth)


def tensors(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- Equality with torch.nn -----------------------------------------------------------------------------------------


PAIRS = {
    "tanh": (lambda layers: RNN(3, 5, layers), lambda layers: nn.RNN(3, 5, layers, batch_first=True)),
    "relu": (
        lambda layers: RNN(3, 5, layers, "relu"),
        lambda layers: nn.RNN(3, 5, layers, nonlinearity="relu", batch_first=True),
    ),
    "lstm": (lambda layers: LSTM(3, 5, layers), lambda layers: nn.LSTM(3, 5, layers, batch_first=True)),
}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("direction", ["to", "from"])
def test_equal_to_torch_with_gradients(kind: str, layers: int, direction: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (build(layers) for build in PAIRS[kind])
    if direction == "to":
        theirs.load_state_dict(to_torch_state_dict(ours.state_dict()))
    else:
        ours.load_state_dict(from_torch_state_dict(theirs.state_dict()))
    x = torch.randn(4, 9, 3)
    initial = torch.randn(layers, 4, 5)
    initial = (initial, torch.randn(layers, 4, 5)) if kind == "lstm" else initial

    results = []
    for net in (ours, theirs):
        x_leaf = x.clone().requires_grad_()
        all_h, state = net(x_leaf, initial)
        outputs = [all_h, *tensors(state)]
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, x_leaf.grad])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)

    # Both of torch's biases have the gradient of our one, so the state dicts of gradients compare one to one.
    our_grads = to_torch_state_dict({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        expected = our_grads[name.replace("bias_hh", "bias_ih")]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_state_dict_round_trip_and_a_torch_model_without_bias() -> None:
    state = LSTM(2, 3, 2).state_dict()
    back = from_torch_state_dict(to_torch_state_dict(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)

    theirs = nn.RNN(2, 3, bias=False, batch_first=True)
    ours = RNN(2, 3)
    ours.load_state_dict(from_torch_state_dict(theirs.state_dict()))
    x = torch.randn(1, 4, 2)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_the_state_dict_of_a_projected_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match="weight_hr_l0"):
        from_torch_state_dict(nn.LSTM(2, 4, proj_size=2).state_dict())


def test_incomplete_state_dict_is_refused() -> None:
    state = RNN(2, 3, 2).state_dict()
    del state["layers.0.weight_h"]
    with pytest.raises(ArgumentError, match="lacks weight_h of layer 0"):
        to_torch_state_dict(state)
    with pytest.raises(ArgumentError, match="lacks"):
        from_torch_state_dict({})


# ---- Derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_gradcheck(kind: type) -> None:
    torch.manual_seed(0)
    net = make(kind, 2, 3)
    parameters = dict(net.named_parameters())
    x = draw(2, 4, 2).requires_grad_()
    stacked = (2,) if kind in (RNN, LSTM) else ()
    halves = 2 if kind in (LSTM, LSTMLayer) else 1
    initial = [draw(*stacked, 2, 3).requires_grad_() for _ in range(halves)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state = rest[0] if halves == 1 else rest[:2]
        values = dict(zip(parameters, rest[halves:], strict=True))
        all_h, last = torch.func.functional_call(net, values, (x, state))
        return (all_h, *tensors(last))

    inputs = (x, *initial, *parameters.values())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", NETS)
def test_kept_states_hold_the_gradient_through_all_later_steps(kind: type) -> None:
    torch.manual_seed(0)
    net = make(kind, 2, 3)
    model = RecurrentRegressionModel(net)
    x = draw(2, 5, 2)
    kept: list = []
    predictions, _all_h = model(x, kept_states=kept)
    predictions[:, -1].sum().backward()
    depth = 2 if kind in (RNN, LSTM) else 1
    assert len(kept) == 5 * depth

    # dL/dh_t by restarting the sequence behind step t; only possible for one layer.
    if depth == 1:
        for t in range(4):
            state = [s.detach().clone().requires_grad_() for s in tensors(kept[t])]
            rest, _ = net(x[:, t + 1 :], state[0] if len(state) == 1 else tuple(state))
            model.head(rest[:, -1]).sum().backward()
            torch.testing.assert_close(tensors(kept[t])[0].grad, state[0].grad)
    assert all(s.grad is not None for s in tensors(kept[-2]))


def test_kept_states_are_also_collected_without_gradients() -> None:
    kept: list[Tensor] = []
    with torch.no_grad():
        all_h, _ = RNNLayer(2, 3)(torch.randn(2, 5, 2), kept_states=kept)
    assert torch.equal(torch.stack(kept, 1), all_h)


# ---- Properties -----------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=25, deadline=None)
@given(kind=st.sampled_from(NETS), steps=st.integers(2, 12), cut=st.integers(1, 11), seed=st.integers(0, 99))
def test_a_sequence_may_be_cut_anywhere(kind: type, steps: int, cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    cut = min(cut, steps - 1)
    net = make(kind, 3, 4)
    x = draw(2, steps, 3)
    whole, last = net(x)
    first, state = net(x[:, :cut])
    second, last_in_pieces = net(x[:, cut:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(tensors(last_in_pieces), tensors(last))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(kind=st.sampled_from(NETS), order=st.permutations(range(5)), seed=st.integers(0, 99))
def test_samples_of_a_batch_do_not_see_each_other(kind: type, order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    net = make(kind, 3, 4)
    x = draw(5, 6, 3)
    torch.testing.assert_close(net(x[order])[0], net(x)[0][order])
    poisoned = x.clone()
    poisoned[order[0]] = float("nan")
    torch.testing.assert_close(net(poisoned)[0][order[1:]], net(x)[0][order[1:]])


@pytest.mark.parametrize("kind", NETS)
def test_the_future_does_not_reach_the_past(kind: type) -> None:
    net = make(kind, 3, 4)
    x = draw(2, 7, 3)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = net(x)[0], net(changed)[0]
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().min() > 0


@pytest.mark.parametrize("kind", NETS)
def test_strided_inputs_copies_and_bfloat16(kind: type) -> None:
    net = make(kind, 3, 4, torch.float32)
    x = torch.randn(6, 2, 3)
    torch.testing.assert_close(net(x.transpose(0, 1))[0], net(x.transpose(0, 1).contiguous())[0])
    with torch.no_grad():
        net(x)
    assert torch.equal(copy.deepcopy(net)(x)[0], net(x)[0])
    with torch.autocast("cpu", torch.bfloat16):
        low, state = net(x)
        again, _ = net(x, state)
    torch.testing.assert_close(low.float(), net(x)[0], atol=2e-2, rtol=0)
    assert again.isfinite().all()


@pytest.mark.parametrize("kind", NETS)
def test_all_parameters_start_uniformly_within_one_over_the_root_of_the_hidden_size(kind: type) -> None:
    torch.manual_seed(0)
    for name, parameter in make(kind, 2, 100).named_parameters():
        assert 0.09 < parameter.abs().max() <= 0.1, name
        assert parameter.mean().abs() < 0.03, name


def test_a_function_may_be_the_nonlinearity() -> None:
    layer = RNNLayer(2, 3, torch.sin)
    all_h, _ = layer(torch.randn(1, 1, 2))
    assert all_h.abs().max() <= 1
    with torch.no_grad():
        layer.bias.fill_(3.0)
        layer.weight_x.zero_()
    assert torch.allclose(layer(torch.randn(1, 1, 2))[0], torch.tensor(3.0).sin())


# ---- The running average --------------------------------------------------------------------------------------------


def test_running_average_batch() -> None:
    x, y = running_average_batch(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert x.shape == y.shape == (3, 7, 1)
    expected = torch.stack([x[:, : t + 1].mean(1) for t in range(7)], 1)
    torch.testing.assert_close(y, expected)
    again, _ = running_average_batch(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(x, again)


def test_a_network_learns_the_running_average() -> None:
    torch.manual_seed(0)
    model = RecurrentRegressionModel(LSTM(1, 8))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        x, y = running_average_batch(10, 32)
        loss = running_average_loss(model(x)[0], y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    # Predicting zero costs the mean square of the targets, (1 + 1/2 + ... + 1/10) / 10 = 0.29.
    assert sum(losses[-10:]) / 10 < 0.03


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_regression_head_on_torch_networks(kind: type) -> None:
    predictions, _all_h = RecurrentRegressionModel(kind(2, 3, batch_first=True, dtype=torch.float64))(draw(4, 5, 2))
    assert predictions.shape == (4, 5, 1)
    assert predictions.dtype == torch.float64


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 2), ShapeError, r"given: \[4, 2\]; accepted: \[B, T, 2\]"),
        (torch.zeros(1, 4, 3), ShapeError, r"given: \[1, 4, 3\]"),
        (torch.zeros(1, 0, 2), ShapeError, "at least one time step"),
        (torch.zeros(1, 4, 2, dtype=torch.float64), DtypeError, "float64, expected torch.float32"),
        (torch.zeros(1, 4, 2, dtype=torch.int64), DtypeError, "int64"),
        ([[[0.0, 0.0]]], ArgumentError, "given: list"),
    ],
)
def test_bad_sequences(kind: type, x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, 2, 3, torch.float32)(x)


@pytest.mark.parametrize(
    ("net", "initial", "error", "message"),
    [
        (RNNLayer(2, 3), torch.zeros(5, 3), StateError, r"\[4, 3\] for these inputs, got \[5, 3\]"),
        (RNNLayer(2, 3), (torch.zeros(4, 3), torch.zeros(4, 3)), StateError, "got tuple"),
        (RNNLayer(2, 3), torch.zeros(4, 3, dtype=torch.float64), DtypeError, "initial has dtype"),
        (RNN(2, 3, 2), torch.zeros(1, 4, 3), StateError, r"\[2, 4, 3\]"),
        (LSTMLayer(2, 3), torch.zeros(4, 3), StateError, "pair"),
        (LSTMLayer(2, 3), (torch.zeros(4, 3), torch.zeros(4, 2)), StateError, r"initial c .*\[4, 2\]"),
        (LSTM(2, 3, 2), (torch.zeros(2, 4, 3), None), StateError, "initial c .*NoneType"),
    ],
)
def test_bad_states(net: nn.Module, initial: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        net(torch.zeros(4, 5, 2), initial)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RNNLayer(0, 3), ArgumentError, "input_size is no count; given: 0; accepted: an int of at least 1"),
        (lambda: RNNLayer(2, 1.5), ArgumentError, "hidden_size .* 1.5"),
        (lambda: LSTM(2, 3, 0), ArgumentError, "num_layers"),
        (lambda: RNN(2, 3, True), ArgumentError, "num_layers"),
        (lambda: RNNLayer(2, 3, "tahn"), ArgumentError, "Did you mean 'tanh'"),
        (lambda: RNNLayer(2, 3, 7), ArgumentError, "given: 7"),
        (lambda: RecurrentRegressionModel(nn.Linear(2, 3)), ArgumentError, "None of Linear"),
        (lambda: RecurrentRegressionModel(nn.RNN(2, 3)), ArgumentError, "batch_first=False"),
        (lambda: RecurrentRegressionModel(RNN(2, 3), 0), ArgumentError, "output_dim"),
        (lambda: running_average_batch(0), ArgumentError, "seq_len"),
        (lambda: running_average_batch(3, -1), ArgumentError, "batch_size"),
        (lambda: running_average_batch(dtype=torch.int64), DtypeError, "int64"),
        (
            lambda: running_average_loss(torch.zeros(2, 3), torch.zeros(2, 3, 1)),
            ShapeError,
            r"\[2, 3\] and \[2, 3, 1\]",
        ),
        (lambda: running_average_loss(torch.zeros(0, 3), torch.zeros(0, 3)), ShapeError, "non-empty"),
        (lambda: running_average_loss(torch.zeros(2, 3), torch.zeros(2, 3).double()), DtypeError, "float64"),
        (lambda: scalar_rnn(0.5, []), ArgumentError, "at least one"),
        (lambda: scalar_rnn(float("nan"), [1.0]), ArgumentError, "finite"),
        (lambda: scalar_rnn(0.5, [float("inf")]), ArgumentError, "finite"),
    ],
)
def test_bad_arguments(build: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(("kind", "gates"), [(RNNLayer, 1), (LSTMLayer, 4)])
def test_orthogonal_recurrence_keeps_the_length_of_a_state(kind: type, gates: int) -> None:
    layer = kind(2, 5)
    others = [layer.weight_x.clone(), layer.bias.clone()]
    layer.draw_orthogonal()
    for gate in layer.weight_h.view(gates, 5, 5):
        torch.testing.assert_close(gate @ gate.T, torch.eye(5))
    assert torch.equal(layer.weight_x, others[0])
    assert torch.equal(layer.bias, others[1])


@pytest.mark.parametrize("kind", [LSTMLayer, LSTM])
def test_forget_bias_opens_the_forget_gates_and_nothing_else(kind: type) -> None:
    torch.manual_seed(1)
    plain = kind(2, 3).state_dict()
    torch.manual_seed(1)
    net = kind(2, 3, forget_bias=2.0)
    for drawn_again in (False, True):
        for name, tensor in net.state_dict().items():
            expected = plain[name].clone()
            if name.endswith("bias"):
                expected[3:6] += 2
            assert torch.equal(tensor, expected), (name, drawn_again)
        torch.manual_seed(1)
        next(m for m in net.modules() if isinstance(m, LSTMLayer)).reset_parameters()
