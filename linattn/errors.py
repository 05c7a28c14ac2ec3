"""Every error this library raises on purpose. Each message restates what was given and what is accepted.

All inherit `LinattnError` and the builtin that a PyTorch user would expect to catch.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable


class LinattnError(Exception):
    """Base class of every error raised on purpose by linattn."""


class ShapeError(LinattnError, ValueError):
    """A tensor's rank or size does not fit the others."""


class DtypeError(LinattnError, TypeError):
    """A dtype is not accepted, or dtypes are mixed outside autocast."""


class DeviceError(LinattnError, ValueError):
    """Tensors live on different devices."""


class ArgumentError(LinattnError, ValueError):
    """An option has a value that is not accepted, or options contradict each other."""


class StateError(LinattnError, ValueError):
    """A recurrent state does not belong to these inputs."""


class BackendError(LinattnError, RuntimeError):
    """A backend named explicitly cannot run this call. Named backends never fall back."""


class DoubleBackwardError(LinattnError, RuntimeError):
    """A second derivative was asked of an operation that has only a first one."""


class MissingExtraError(LinattnError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'linattn[{extra}]'"
        )


class DataError(LinattnError, ValueError):
    """A data file is missing, unreadable or not what was expected."""


class CheckpointError(LinattnError, RuntimeError):
    """A checkpoint cannot be read or written. An earlier checkpoint is never damaged by a failed write."""


ErrorType = TypeVar("ErrorType", bound=LinattnError)


def refusal(error: type[ErrorType], failed: str, *, given: object, accepted: object) -> ErrorType:
    """Build an error in the one grammar of this library: what failed; given: ...; accepted: ...

    Args:
        error: its type.
        failed: what cannot be, without a full stop.
        given: the values that were given, as they are to be read.
        accepted: what would have been accepted, or the way out.

    Example:
        >>> str(refusal(ArgumentError, "chunk is too small", given=0, accepted="an int of at least 1"))
        'chunk is too small; given: 0; accepted: an int of at least 1'
    """
    return error(f"{failed}; given: {given}; accepted: {accepted}")


def unknown_name(
    what: str, given: object, accepted: Iterable[str], error: type[LinattnError] = ArgumentError
) -> LinattnError:
    """Build the error for a name that is not in a list, suggesting the nearest one.

    Args:
        what: the kind of name, such as "kernel".
        given: the name that was given.
        accepted: the names that exist.
        error: the type of the error.
    """
    names = sorted(accepted)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return error(f"unknown {what} {given!r}; accepted: {', '.join(map(repr, names))}.{hint}")
