"""linattn: attention that is a kernel over its inputs."""

from __future__ import annotations

from linattn._util.source_tree import search_path
from linattn._util.version import __version__

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
