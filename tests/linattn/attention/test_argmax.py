"""Argmax attention: the worked example, the gradients that are zero, and softmax falling towards it."""

from __future__ import annotations

import pytest
import torch

import linattn
from linattn.errors import LinattnError
from linattn.testing import evaluate, make_inputs, truth_argmax


def _example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = torch.tensor([[1.0, 2, 0], [0, 3, 4], [5, 0, 0], [0, 0, 1]])
    values = torch.tensor([[2.0, 0, 1], [1, 4, 3], [0, -1, 4], [1, 0, -1]])
    query = torch.tensor([[1.0, 1, 2]])
    return query[None, None], keys[None, None], values[None, None]


def test_the_worked_example() -> None:
    q, k, v = _example()
    assert (q @ k.mT).flatten().tolist() == [3.0, 11.0, 5.0, 2.0]
    assert linattn.argmax_attention(q, k, v).flatten().tolist() == [1.0, 4.0, 3.0]


def test_queries_and_keys_cannot_learn() -> None:
    q, k, v = _example()
    _, (dq, dk, dv) = evaluate(linattn.argmax_attention, (q, k, v))
    assert not dq.any()
    assert not dk.any()
    assert dv[0, 0, 1].all()
    assert not dv[0, 0, [0, 2, 3]].any()


def test_softmax_tends_to_it_as_the_temperature_falls() -> None:
    q, k, v = _example()
    limit = linattn.argmax_attention(q, k, v)
    distances = [
        (linattn.softmax_attention(q, k, v, scale=1 / temperature) - limit).norm().item()
        for temperature in (8.0, 4.0, 2.0, 1.0, 0.25)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6 < distances[0]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_many_queries_pick_each_their_own_value(layout: str) -> None:
    q, k, v = make_inputs(queries=300, keys=270, value_size=5, layout=layout)
    assert torch.equal(linattn.argmax_attention(q, k, v), truth_argmax(q, k, v))


def test_values_picked_twice_add_their_gradients() -> None:
    q, k, v = make_inputs(queries=50, keys=4)
    (_,), (_, _, dv) = evaluate(linattn.argmax_attention, (q, k, v))
    (_,), (_, _, truth) = evaluate(truth_argmax, (q, k, v))
    assert torch.allclose(dv, truth, rtol=1e-12, atol=1e-12)


def test_there_must_be_a_key() -> None:
    q, k, v = make_inputs(queries=2, keys=1)
    with pytest.raises(LinattnError):
        linattn.argmax_attention(q, k[:, :, :0], v[:, :, :0])
