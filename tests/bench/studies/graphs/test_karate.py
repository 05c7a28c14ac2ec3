"""The karate club's data, and the two graph layers against plain formulas."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from linattn.bench.studies.graphs import karate, karate_club

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "karate"


def test_the_club_is_zacharys() -> None:
    a = karate_club.adjacency()
    assert len(karate_club.edges()) == 78
    assert torch.equal(a, a.mT)
    assert a.diagonal().sum() == 0
    assert (a.sum(1)[[0, 33]].tolist(), a.sum(1).min().item()) == ([16, 17], 1)
    assert karate_club.clubs().sum() == 17
    assert karate_club.capacities().sum() == 2 * 231


def test_the_club_is_that_of_the_data_folder() -> None:
    if not DATA.is_dir():
        pytest.skip(f"there is no {DATA} to compare with")
    with (DATA / "edges.csv").open() as file:
        rows = {(int(row["u"]), int(row["v"])): int(row["weight"]) for row in csv.DictReader(file)}
    with (DATA / "nodes.csv").open() as file:
        officers = [int(row["node"]) for row in csv.DictReader(file) if row["club"] == "Officer"]
    c = karate_club.capacities()
    assert {edge: c[edge].item() for edge in karate_club.edges()} == rows
    assert tuple(officers) == karate_club.JOINED_THE_OFFICER


def test_zacharys_cut_is_wrong_about_member_8_only() -> None:
    assert karate.zachary() == [8]


def test_graph_convolution_is_its_formula() -> None:
    a = karate_club.adjacency(torch.float64)
    layer = karate.GraphConvolution(5, 3, a)
    h = torch.randn(34, 5, dtype=torch.float64)
    looped = a + torch.eye(34, dtype=torch.float64)
    root = torch.diag(looped.sum(1) ** -0.5)
    expected = torch.tanh(root @ looped @ root @ h @ layer.weight.mT)
    torch.testing.assert_close(layer(h), expected)


def test_graph_attention_is_softmax_among_neighbours() -> None:
    a = karate_club.adjacency(torch.float64)
    layer = karate.GraphAttention(5, 3, a)
    h = torch.randn(34, 5, dtype=torch.float64)
    q, k, v = (h @ weight.mT for weight in layer.weights)
    strangers = (a + torch.eye(34, dtype=torch.float64)) == 0
    p = (q @ k.mT / 3**0.5).masked_fill(strangers, -torch.inf).softmax(1)
    torch.testing.assert_close(layer(h), torch.tanh(p @ v))


@pytest.mark.parametrize("name", karate.LAYERS)
def test_a_layer_hears_neighbours_only(name: str) -> None:
    a = karate_club.adjacency(torch.float64)
    layer = karate.LAYERS[name](4, 2, a)
    h = torch.randn(34, 4, dtype=torch.float64, requires_grad=True)
    heard = torch.autograd.grad(layer(h)[8].sum(), h)[0].abs().sum(1) > 0
    assert heard.nonzero().flatten().tolist() == [0, 2, 8, 30, 32, 33]


def test_labels_of_the_held_out_do_not_reach_training(monkeypatch: pytest.MonkeyPatch) -> None:
    before = karate.train(karate.GraphConvolution, 30, seed=0)
    swapped = karate_club.clubs()
    swapped[karate.held_out()] = 1 - swapped[karate.held_out()]
    monkeypatch.setattr(karate, "clubs", lambda: swapped)
    after = karate.train(karate.GraphConvolution, 30, seed=0)
    assert after.losses[0] == before.losses[0]
    assert after.losses[1] != before.losses[1]


def test_the_gradient_check_sees_a_wrong_gradient() -> None:
    class Wrong(karate.GraphConvolution):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            out = super().forward(h)
            return out + 0.01 * (self.weight.detach() - self.weight).sum()

    assert karate.gradient_error(karate.GraphConvolution, 0) < 1e-7
    assert karate.gradient_error(Wrong, 0) > 1e-3
