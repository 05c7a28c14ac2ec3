"""A progress bar on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Bar(Protocol):
    """The part of a tqdm bar that is used here; `n` is how far it has come."""

    n: float

    def update(self, n: float = 1) -> object:
        """Go on by n."""

    def clear(self) -> object:
        """Free the line, so that something else can be printed; the next update draws the bar again."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> object:
        """Show a text behind the bar."""


@contextmanager
def progress(total: float | None, unit: str, *, show: bool = True, **style: Any) -> Iterator[Bar]:
    """Draw a bar; nothing is drawn where stderr is no terminal or tqdm is not installed.

    Args:
        total: the end of the bar; None when it is not known.
        unit: the thing that is counted.
        show: False for no bar anywhere.
        **style: options of tqdm.

    Example:
        >>> with progress(3, "job") as bar:
        ...     _ = bar.update()
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, unit=unit, disable=not (show and sys.stderr.isatty()), file=sys.stderr, **style) as bar:
        yield bar


class _NoBar:
    n = 0.0

    def update(self, n: float = 1) -> None: ...
    def clear(self) -> None: ...
    def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...
