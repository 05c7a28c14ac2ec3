"""Padded and packed batches, both directions, and the classifier: held against torch.nn, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from linattn.errors import ArgumentError, StateError
from linattn.rnn import (
    LSTM,
    RNN,
    LSTMLayer,
    RecurrentClassifier,
    RecurrentLM,
    RecurrentRegressionModel,
    RNNLayer,
    from_torch_state_dict,
    to_torch_state_dict,
)
from linattn.rnn.sequences import reverse

KINDS = {"rnn": (RNN, nn.RNN), "lstm": (LSTM, nn.LSTM)}
LENGTHS = torch.tensor([4, 7, 1, 5])


def halves(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["to", "from"])
def test_packed_batches_equal_torch_with_gradients(kind: str, bidirectional: bool, direction: str) -> None:
    make_ours, make_theirs = KINDS[kind]
    ours = make_ours(3, 5, 2, bidirectional=bidirectional)
    theirs = make_theirs(3, 5, 2, batch_first=True, bidirectional=bidirectional)
    if direction == "to":
        theirs.load_state_dict(to_torch_state_dict(ours.state_dict()))
    else:
        ours.load_state_dict(from_torch_state_dict(theirs.state_dict()))
    x = torch.randn(4, 7, 3)
    initial = torch.randn(ours.state_count, 4, 5)
    initial = (initial, torch.randn(ours.state_count, 4, 5)) if kind == "lstm" else initial

    results = []
    for net in (ours, theirs):
        leaf = x.clone().requires_grad_()
        packed = pack_padded_sequence(leaf, LENGTHS, batch_first=True, enforce_sorted=False)
        all_h, state = net(packed, initial)
        assert isinstance(all_h, PackedSequence)
        assert torch.equal(all_h.batch_sizes, packed.batch_sizes)
        outputs = [all_h.data, *halves(state)]
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, leaf.grad])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)
    found = to_torch_state_dict({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        expected = found[name.replace("bias_hh", "bias_ih")]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [RNNLayer, LSTMLayer, RNN, LSTM])
def test_lengths_packed_and_one_by_one_agree(make: type) -> None:
    net = make(3, 4, dtype=torch.float64)
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    x[torch.arange(7) >= LENGTHS[:, None]] = torch.nan
    padded, state = net(x, lengths=LENGTHS)
    packed, packed_state = net(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed, batch_first=True)[0], padded)
    torch.testing.assert_close(halves(packed_state), halves(state))
    for row, length in enumerate(LENGTHS.tolist()):
        alone, end = net(x[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0])
        assert not padded[row, length:].any()
        for batch, single in zip(halves(state), halves(end), strict=True):
            torch.testing.assert_close(batch.unflatten(-2, (-1,))[..., row, :], single[..., 0, :])


@pytest.mark.parametrize("make", [RNN, LSTM])
def test_nan_in_padding_reaches_no_gradient(make: type) -> None:
    net = make(3, 4, 2, bidirectional=True)
    x = torch.randn(4, 7, 3)
    x[torch.arange(7) >= LENGTHS[:, None]] = torch.nan
    all_h, state = net(x, lengths=LENGTHS)
    (all_h.sum() + sum(half.sum() for half in halves(state))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_reversing_twice_is_no_change(lengths: list[int]) -> None:
    x = torch.randn(len(lengths), 9, 2)
    once = reverse(x, torch.tensor(lengths))
    assert torch.equal(reverse(once, torch.tensor(lengths)), x)
    for row, length in enumerate(lengths):
        assert torch.equal(once[row, :length], x[row, :length].flip(0))
        assert torch.equal(once[row, length:], x[row, length:])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("make", [RNN, LSTM])
def test_classifier_reads_the_state_at_the_end(make: type, bidirectional: bool) -> None:
    net = make(3, 4, 2, bidirectional=bidirectional)
    model = RecurrentClassifier(net, 5, dropout=0.5).eval()
    x = torch.randn(4, 7, 3)
    _, state = net(x, lengths=LENGTHS)
    h = halves(state)[0]
    top = torch.cat((h[-2], h[-1]), -1) if bidirectional else h[-1]
    torch.testing.assert_close(model(x, LENGTHS), model.head(top))
    changed = x.clone()
    changed[0, 4:] += 1
    assert torch.equal(model(changed, LENGTHS), model(x, LENGTHS))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_regression_head_on_both_directions(kind: type) -> None:
    theirs = RecurrentRegressionModel(kind(2, 3, batch_first=True, bidirectional=True))
    ours = RecurrentRegressionModel(LSTM(2, 3, bidirectional=True))
    for model in (theirs, ours):
        predictions, all_h = model(torch.randn(4, 5, 2))
        assert predictions.shape == (4, 5, 1)
        assert all_h.shape == (4, 5, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RNNLayer(2, 3)(torch.zeros(2, 4, 2), lengths=[1, 2]), ArgumentError, r"list; accepted: an int64"),
        (lambda: RNNLayer(2, 3)(torch.zeros(2, 4, 2), lengths=torch.tensor([1, 5])), ArgumentError, "from 1 to 5"),
        (lambda: RNNLayer(2, 3)(torch.zeros(2, 4, 2), lengths=torch.tensor([0, 4])), ArgumentError, "from 0 to 4"),
        (lambda: LSTM(2, 3)(torch.zeros(2, 4, 2), lengths=torch.tensor([1.0, 4.0])), ArgumentError, "float32"),
        (lambda: LSTM(2, 3)(torch.zeros(2, 4, 2), lengths=torch.tensor([1, 2, 3])), ArgumentError, r"shape \[3\]"),
        (
            lambda: RNN(2, 3)(pack_padded_sequence(torch.zeros(1, 4, 2), [4], batch_first=True), lengths=LENGTHS[:1]),
            ArgumentError,
            "a PackedSequence has lengths of its own",
        ),
        (
            lambda: RNN(2, 3, 2, bidirectional=True)(torch.zeros(4, 5, 2), torch.zeros(2, 4, 3)),
            StateError,
            r"\[4, 4, 3",
        ),
        (lambda: RecurrentClassifier(RNN(2, 3), 0), ArgumentError, "classes"),
        (lambda: RecurrentClassifier(RNN(2, 3), 2, dropout=1.0), ArgumentError, "dropout=1.0"),
        (lambda: RecurrentLM(5, RNN(2, 3, bidirectional=True)), ArgumentError, "bidirectional"),
    ],
)
def test_bad_calls(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
