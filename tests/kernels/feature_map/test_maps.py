"""The tables of elementwise feature maps agree: Python, C++ and Triton know the same maps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import linattn
from linattn import feature_maps
from linattn.kernels.feature_map.maps import MAPS
from linattn.testing import make_inputs

FOLDER = Path(__file__).parents[3] / "kernels" / "feature_map"


def test_every_map_has_a_number_in_cpp() -> None:
    text = (FOLDER / "native" / "maps.hpp").read_text(encoding="utf-8")
    listed = re.search(r"enum class Map : int \{([^}]*)\}", text)
    assert listed
    names = [name.strip() for name in listed[1].split(",")]
    assert sorted(entry.native for entry in MAPS.values()) == list(range(len(names)))
    for name in names:
        assert f"case Map::{name}:" in text
        assert name == "identity" or text.count(f"if constexpr (map == Map::{name})") == 2


def test_every_map_is_written_in_triton() -> None:
    text = (FOLDER / "gpu" / "maps.py").read_text(encoding="utf-8")
    written = re.findall(r'if MAP == "([^"]+)":', text)
    for name in set(MAPS) - {"identity"}:
        assert written.count(name) == 2
    assert set(written) <= set(MAPS)


def test_every_map_is_a_public_name() -> None:
    assert set(MAPS) <= set(feature_maps.NAMES)
    assert {name for name in MAPS if name in feature_maps.POSITIVE} == {n for n, m in MAPS.items() if m.positive}


@pytest.mark.parametrize("name", MAPS)
def test_the_backend_computes_the_map_of_the_table(name: str) -> None:
    q, k, v = make_inputs(keys=20, dtype=torch.float32)
    normalize = MAPS[name].positive
    found = linattn.linear_attention(q, k, v, feature_map=name, normalize=normalize)
    phi = MAPS[name].phi
    mapped = linattn.linear_attention(phi(q), phi(k), v, feature_map="identity", normalize=False)
    ones = torch.ones_like(v)
    sums = linattn.linear_attention(phi(q), phi(k), ones, feature_map="identity", normalize=False)
    assert torch.allclose(found, mapped / sums if normalize else mapped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_the_slope_is_the_derivative(name: str) -> None:
    x = torch.linspace(-3, 3, 12, dtype=torch.float64, requires_grad=True)
    phi, slope, *_ = MAPS[name]
    (expected,) = torch.autograd.grad(phi(x).sum(), x)
    assert torch.allclose(slope(x.detach()), expected)
