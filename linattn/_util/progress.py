"""A progress bar on stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Bar(Protocol):
    """What is used of a bar; `n` is how far it has come."""

    n: float

    def update(self, n: float = 1) -> object: ...
    def clear(self) -> object: ...
    def set_postfix_str(self, s: str) -> object: ...


@contextmanager
def progress(total: float | None, unit: str, **style: Any) -> Iterator[Bar]:
    """A bar up to `total`, by tqdm and its options; none where stderr is no terminal or tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _NoBar()
        return
    with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty(), file=sys.stderr, **style) as bar:
        yield bar


class _NoBar:
    n = 0.0

    def update(self, n: float = 1) -> None: ...
    def clear(self) -> None: ...
    def set_postfix_str(self, s: str) -> None: ...
