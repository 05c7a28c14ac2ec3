"""linattn: attention that is a kernel over its inputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from linattn._util.source_tree import search_path
from linattn._util.version import __version__

if TYPE_CHECKING:
    from types import ModuleType

__path__ = search_path(__path__)

from linattn import cost, errors
from linattn._dispatch.plan import use_backend
from linattn.decode import DecodeCache
from linattn.functional import (
    argmax_attention,
    attention,
    explain,
    kernel_attention,
    linear_attention,
    quadratic_attention,
    quadratic_condition,
    softmax_attention,
)
from linattn.states import FeatureMapState, QuadraticState

__all__ = [
    "DecodeCache",
    "FeatureMapState",
    "QuadraticState",
    "__version__",
    "argmax_attention",
    "attention",
    "cost",
    "errors",
    "explain",
    "kernel_attention",
    "linear_attention",
    "quadratic_attention",
    "quadratic_condition",
    "softmax_attention",
    "use_backend",
]

# Imported at first use: `import linattn` alone makes `linattn.modules` work, and costs no more than the operations.
_ROOMS = (
    "autoencoders",
    "bench",
    "decode",
    "distributed",
    "feature_maps",
    "functional",
    "integrations",
    "kernels",
    "lm",
    "modules",
    "recurrence",
    "rnn",
    "states",
    "testing",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"linattn.{name}")
    raise AttributeError(f"module 'linattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
