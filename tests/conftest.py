"""Fixtures and profiles that every test shares."""

from __future__ import annotations

import contextlib

import pytest
import torch

# CI repeats itself exactly; `pytest --hypothesis-profile=long` searches afresh and wider. The tests of the Triton
# kernels do without hypothesis, which the machine with the GPU may not have.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    _shared = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
    settings.register_profile("ci", max_examples=25, derandomize=True, **_shared)
    settings.register_profile("long", max_examples=1000, **_shared)
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "usual_tiles: compute in tiles of the usual size instead of the smallest")
    config.addinivalue_line("markers", "unpoisoned: leave uninitialised memory as torch gives it (compiled code)")
