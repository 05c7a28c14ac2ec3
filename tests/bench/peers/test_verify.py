"""Peers: each is proved, named as different, listed as missing, or says why it cannot run. None disappears."""

from __future__ import annotations

import pytest
import torch

from linattn.bench.measuring import timing
from linattn.bench.measuring.results import Results
from linattn.bench.peers import implementations, verify
from linattn.bench.peers.implementations import PEERS, Peer
from linattn.bench.peers.verify import Proof, prove
from linattn.cli.main import main

CPU = torch.device("cpu")
PLAIN = ("sdpa", "sdpa-math", "naive", "features-cumsum", "elu-cumsum")


@pytest.mark.parametrize("peer", PLAIN)
def test_peers_in_plain_pytorch_are_proved(peer: str) -> None:
    proof = prove(peer, CPU, "fp32")
    assert proof.state == "proved", proof
    assert proof.error <= 1e-5
    assert proof.gradient_error <= 1e-5


def test_a_peer_that_computes_something_else_is_named(monkeypatch) -> None:
    monkeypatch.setitem(PEERS, "scaled", Peer("quadratic", implementations._load_sdpa))
    proof = prove("scaled", CPU, "fp32")
    assert proof.state == "differs"
    assert proof.error > 1e-3
    assert "not compared" in proof.detail


def test_a_wrong_gradient_alone_is_a_difference(monkeypatch) -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy / 2

    sdpa = implementations._load_sdpa()
    monkeypatch.setitem(PEERS, "halved", Peer("softmax", lambda: lambda q, k, v, c: Halved.apply(sdpa(q, k, v, c))))
    proof = prove("halved", CPU, "fp32")
    assert proof.error < 1e-6
    assert proof.state == "differs"


def test_nan_is_no_proof(monkeypatch) -> None:
    monkeypatch.setitem(PEERS, "nan", Peer("softmax", lambda: lambda q, k, v, c: q * torch.nan + v))
    assert prove("nan", CPU, "fp32").state == "differs"


def test_what_is_not_installed_is_missing(monkeypatch) -> None:
    def absent():
        import no_such_package_here  # noqa: F401

    monkeypatch.setitem(PEERS, "absent", Peer("power", absent, "no-such-package"))
    assert prove("absent", CPU, "fp32") == Proof(
        "absent", "no-such-package", "power", "missing", detail="pip install no-such-package"
    )


def test_what_cannot_run_says_why(monkeypatch) -> None:
    def refuse(*_):
        raise RuntimeError("0 active drivers\nand more")

    monkeypatch.setitem(PEERS, "refusing", Peer("power", lambda: refuse))
    proof = prove("refusing", CPU, "fp32")
    assert (proof.state, proof.detail) == ("cannot run here", "0 active drivers")


def test_forward_only_is_said(monkeypatch) -> None:
    sdpa = implementations._load_sdpa()

    def forward_only(q, k, v, is_causal):
        if q.requires_grad:
            raise RuntimeError("no backward here")
        return sdpa(q, k, v, is_causal)

    monkeypatch.setitem(PEERS, "forward", Peer("softmax", lambda: forward_only))
    proof = prove("forward", CPU, "fp32")
    assert proof.state == "proved"
    assert proof.gradient_error is None
    assert proof.detail == "forward only: no backward here"


def test_every_peer_has_words_for_what_it_computes() -> None:
    assert {peer.op for peer in PEERS.values()} <= set(verify.COMPUTES)
    assert set(verify.LINEAR_PEERS) <= set(PEERS)
    assert all(verify.method_of(name).op == peer.op for name, peer in PEERS.items())


def test_the_command_lists_all_and_measures_what_passed(tmp_path, monkeypatch, capsys) -> None:
    def absent():
        import no_such_package_here  # noqa: F401

    few = {name: PEERS[name] for name in ("sdpa", "naive", "elu-cumsum")}
    other = {"other": Peer("quadratic", implementations._load_sdpa), "absent": Peer("power", absent, "no-such-package")}
    for name in list(PEERS):
        monkeypatch.delitem(PEERS, name)
    for name, peer in {**few, **other}.items():
        monkeypatch.setitem(PEERS, name, peer)
    monkeypatch.setattr(timing, "WARM_UP_MS", 0.0)
    monkeypatch.setattr("linattn.bench.measuring.memory._can_measure_cpu", lambda: False)
    options = ["--length", "64", "--head-size", "8", "--heads", "1", "--budget", "0", "--device", "cpu"]
    assert main(["peers", *options, "--out", str(tmp_path)]) == 0
    found = Results.load(tmp_path / "results.json")
    states = {proof.peer: proof.state for proof in verify.proofs_in(found)}
    assert states == {**dict.fromkeys(few, "proved"), "other": "differs", "absent": "missing"}
    names = [one.method.name for one in found.measurements]
    assert names == ["SDPA", "naive", "elu-cumsum", "quadratic direct", "quadratic chunked", "elu+1 chunked"]
    assert all(one.error < 1e-5 for one in found.measurements)
    assert "no-such-package" in capsys.readouterr().out
