"""The operations under test beside their truth, and memory that is poisoned before an operation writes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

import linattn
from linattn import testing


@dataclass(frozen=True)
class Operation:
    """One form of one public function, and the float64 formula it must equal."""

    run: Callable[..., Any]
    truth: Callable[..., Any]
    causal_only: bool = False
    has_state: bool = False


def _operations() -> dict[str, Operation]:
    table = {"softmax": Operation(linattn.softmax_attention, testing.truth_softmax)}
    for form in ("direct", "chunked", "recurrent"):
        once = form == "recurrent"
        table[f"quadratic-{form}"] = Operation(
            partial(linattn.quadratic_attention, form=form), testing.truth_quadratic, once, has_state=True
        )
        table[f"linear-{form}"] = Operation(
            partial(linattn.linear_attention, form=form), testing.truth_linear, once, has_state=True
        )
    return table


OPERATIONS = _operations()


@pytest.fixture(params=sorted(OPERATIONS))
def operation(request: pytest.FixtureRequest) -> Operation:
    return OPERATIONS[request.param]


@pytest.fixture(params=sorted(name for name, operation in OPERATIONS.items() if operation.has_state))
def stateful(request: pytest.FixtureRequest) -> Operation:
    return OPERATIONS[request.param]


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and chunks (64 rows and 32 keys), so that sequences of some hundred tokens cross several."""
    if request.node.get_closest_marker("usual_tiles") is None:
        monkeypatch.setattr("linattn.kernels.common.reference.tiles.TILE_ELEMENTS", 1)
        monkeypatch.setattr("linattn.kernels.common.reference.tiles.SHORTEST_TILE", 64)
        monkeypatch.setattr("linattn.kernels.common.reference.scan.CHUNK_ELEMENTS", 1)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.node.get_closest_marker("unpoisoned") else testing.poisoned_memory():
        yield
