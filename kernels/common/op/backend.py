"""Tell what is known of a backend before its module is imported: which calls it can run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch

from linattn._util.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_HEAD = 256
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BackendQuery(NamedTuple):
    """The facts that decide whether a backend can run a call of an op with a state, or of softmax (form "direct").

    Attributes:
        named: the backend was asked for by name; "auto" is more careful.
        T: queries.
        with_state: a state stands before the call or is asked for after it.
    """

    device: str
    dtype: torch.dtype
    D: int
    M: int
    form: str
    named: bool
    T: int = 1
    with_state: bool = False


class Backend(NamedTuple):
    """One way to compute an op, as far as it is known before its module is imported.

    Attributes:
        refusal: why it cannot run a call; "" if it can.
        runs: the kernels, in words; "" where they depend on the call, which its module's `describe` then tells.
    """

    refusal: Callable[[BackendQuery], str]
    runs: str = ""


def anything(query: BackendQuery) -> str:
    """Refuse nothing."""
    return ""


def native(query: BackendQuery) -> str:
    """Say why the C++ kernels cannot run a call: CPU tensors, every dtype but fp64."""
    if query.device != "cpu":
        return f"device {query.device}: the native kernels run on the CPU"
    return NATIVE_ABSENT or _beyond_fused(query)


def triton(query: BackendQuery) -> str:
    """Say why the Triton kernels cannot: CUDA and ROCm devices, or anything Triton's interpreter can hold,
    if asked for by name.
    """
    if TRITON_ABSENT:
        return TRITON_ABSENT
    if query.device != "cuda" and not INTERPRETED:
        return f"device {query.device}: the Triton kernels run on a GPU, or elsewhere with TRITON_INTERPRET=1"
    if INTERPRETED and not query.named:
        return "Triton's interpreter is for tests, and must be asked for by name"
    return _beyond_fused(query)


def _beyond_fused(query: BackendQuery) -> str:
    if query.dtype not in FUSED_DTYPES:
        return f"{query.dtype}: only the reference computes in it"
    if query.D > LARGEST_HEAD or query.M > LARGEST_HEAD:
        return f"head sizes beyond {LARGEST_HEAD}: D = {query.D}, M = {query.M}"
    return ""


def _native_absent() -> str:
    try:
        extension = importlib.import_module("linattn._native")
    except ImportError:
        return "the native module is not built: `linattn info` says why"
    built = extension.build_info()["version"]
    if built != __version__:
        return f"the native module was built for linattn {built}, this is {__version__}"
    try:
        extension.capability()
    except ValueError as error:
        warnings.warn(f"linattn runs without its native kernels: {error}", stacklevel=2)
        return str(error)
    return ""


def _capability() -> str:
    return "absent" if NATIVE_ABSENT else str(importlib.import_module("linattn._native").capability())


NATIVE_ABSENT = _native_absent()
CAPABILITY = _capability()
"""The instruction set of the native kernels. A constant, since traced code cannot ask for it."""
TRITON_ABSENT = "" if importlib.util.find_spec("triton") else "triton is not installed: pip install 'linattn[triton]'"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
