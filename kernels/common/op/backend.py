"""What is known of a backend before its module is imported: where it lives and which calls it can run."""

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


class Call(NamedTuple):
    """What decides whether a backend can run a call of an op with a state, or of softmax (form "direct")."""

    device: str
    dtype: torch.dtype
    D: int
    M: int
    form: str
    named: bool
    """Whether the backend was asked for by name; "auto" is more careful."""
    T: int = 1
    """Query rows."""
    with_state: bool = False
    """Whether a state stands before the call or is asked for after it."""


class Backend(NamedTuple):
    """One implementation of an op: a module with `forward` and `backward`, imported when first called."""

    module: str
    refusal: Callable[[Call], str]
    """Why it cannot run a call; "" if it can."""
    runs: str = ""
    """What it runs, in words; where that depends on the call, the module has a function
    `describe(q, k, v, is_causal, form) -> str` instead."""


def anything(call: Call) -> str:
    return ""


def native(call: Call) -> str:
    """The C++ kernels: CPU tensors, every dtype but fp64."""
    if call.device != "cpu":
        return f"device {call.device}: the native kernels run on the CPU"
    return NATIVE_ABSENT or _beyond_fused(call)


def triton(call: Call) -> str:
    """The Triton kernels: CUDA and ROCm devices, or anything Triton's interpreter can hold, if asked for by name."""
    if TRITON_ABSENT:
        return TRITON_ABSENT
    if call.device != "cuda" and not INTERPRETED:
        return f"device {call.device}: the Triton kernels run on a GPU, or elsewhere with TRITON_INTERPRET=1"
    if INTERPRETED and not call.named:
        return "Triton's interpreter is for tests, and must be asked for by name"
    return _beyond_fused(call)


def _beyond_fused(call: Call) -> str:
    if call.dtype not in FUSED_DTYPES:
        return f"{call.dtype}: only the reference computes in it"
    if call.D > LARGEST_HEAD or call.M > LARGEST_HEAD:
        return f"head sizes beyond {LARGEST_HEAD}: D = {call.D}, M = {call.M}"
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
