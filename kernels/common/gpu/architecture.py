"""Which entries of a configuration table apply: by GPU architecture."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch

from linattn.kernels.common.op.backend import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Iterator

KNOWN = ("sm_80", "sm_90", "sm_100", "gfx942", "consumer", "interpreter")
"""consumer: 99 KB of shared memory a program (sm_86, sm_89, sm_120), and whatever else has no entry of its own.
interpreter: small tiles, so that short sequences cross several."""

_forced: list[str] = []


@contextlib.contextmanager
def as_architecture(name: str) -> Iterator[None]:
    """Choose configurations as on this architecture, whatever the device."""
    assert name in KNOWN, f"{name} is not one of {KNOWN}"
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """Return what `as_architecture` asks for here, if it does."""
    return _forced[-1] if _forced else None


def architecture(device: torch.device) -> str:
    """Return the name, out of KNOWN, under which a device's configurations are filed."""
    if name := forced():
        return name
    if INTERPRETED:
        return "interpreter"
    return _of_device(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _of_device(index: int) -> str:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        name = f"sm_{major}{minor}"
    return name if name in KNOWN else "consumer"
