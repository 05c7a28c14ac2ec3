"""Files that appear complete or not at all."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from linattn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` complete or not at all.

    It is written beside its destination, flushed to the disk, then moved over it. On an error `path` is untouched and
    nothing is left behind. Folders above `path` are made.

    Raises:
        OSError: what the system says, such as a full disk.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "deep" / "file"
        >>> with atomic_file(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all.

    Raises:
        DataError: it cannot be written; what was there stays as it was.
    """
    try:
        with atomic_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}; accepted: a folder to write") from error


def write_json(path: Path, content: object, *, indent: int = 1) -> None:
    """Write a JSON file as `write_text` does; errors as there."""
    write_text(path, json.dumps(content, indent=indent) + "\n")
