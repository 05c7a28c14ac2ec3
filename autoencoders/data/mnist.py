"""MNIST from its original IDX files: read, checked, and fetched when asked for.

An IDX file is a big-endian header and raw bytes: two zero bytes, the type (8: uint8), the number of dimensions, each
dimension as an uint32, then the entries. Source: LeCun, Cortes and Burges, The MNIST database of handwritten digits.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from linattn._util.files import atomic_file
from linattn._util.progress import progress
from linattn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
TIMEOUT = 30.0
CHUNK = 1 << 16


class Part(NamedTuple):
    """One of the four files: its name without `.gz`, its shape, and the SHA-256 of its uncompressed bytes."""

    name: str
    shape: tuple[int, ...]
    sha256: str


TRAIN_IMAGES = Part(
    "train-images-idx3-ubyte", (60_000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
)
TRAIN_LABELS = Part(
    "train-labels-idx1-ubyte", (60_000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
)
TEST_IMAGES = Part(
    "t10k-images-idx3-ubyte", (10_000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
)
TEST_LABELS = Part(
    "t10k-labels-idx1-ubyte", (10_000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
)
PARTS = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


class Mnist(NamedTuple):
    """Images uint8 `[n, 28, 28]`, 0 is background; labels int64 `[n]`, 0 to 9; 60,000 to train, 10,000 to test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_mnist(folder: Path | None = None, *, download: bool = False) -> Mnist:
    """Read the four files of MNIST, compressed or not, and check their contents byte for byte.

    Args:
        folder: where they lie; `cache_folder()` when not given.
        download: fetch those that are missing there first (11.6 MB in all). Nothing is fetched otherwise.

    Raises:
        DataError: a file is missing, damaged, or not the one it should be; the download failed.
    """
    folder = cache_folder() if folder is None else folder
    if download:
        download_mnist(folder)
    images, labels, test_images, test_labels = (_read_part(folder, part) for part in PARTS)
    return Mnist(images, labels.long(), test_images, test_labels.long())


def cache_folder() -> Path:
    """Return the folder of downloads: `linattn/mnist` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linattn" / "mnist"


def download_mnist(folder: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Fetch the files that are missing in `folder`, trying one mirror after another; each is checked before it is kept.

    Raises:
        DataError: no mirror has a file that is right, with what each of them said; the folder cannot be written.
    """
    for part in PARTS:
        if _find(folder, part) is None:
            _download(folder / f"{part.name}.gz", part, mirrors)


def read_idx(path: Path, *, sha256: str | None = None) -> Tensor:
    """Read an IDX file of bytes, compressed if its name ends in `.gz`: a uint8 tensor of the shape in its header.

    Args:
        path: the file.
        sha256: checksum that its uncompressed bytes must have; not checked when not given.

    Raises:
        DataError: naming the file, what it holds and what was expected: it is missing, not gzip, cut short, of another
            type (magic number) or size, or has another checksum.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "two-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        >>> read_idx(path)
        tensor([7, 9], dtype=torch.uint8)
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; accepted: an IDX file of bytes, compressed (.gz) or not") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; accepted: a complete file, gzip if named .gz") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not content[3]:
        raise DataError(
            f"{path} begins with {content[:4].hex(' ') or 'nothing'}; "
            "expected the magic number 00 00 08 0n of an IDX file of bytes in n > 0 dimensions"
        )
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path} has {len(content)} bytes; expected {start + math.prod(shape)}, as its header says shape {shape}"
        )
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path} has checksum {found} (SHA-256, uncompressed); expected {sha256}")
    # A copy: the bytes that were read cannot be written to, a tensor can.
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def _find(folder: Path, part: Part) -> Path | None:
    return next((path for path in (folder / f"{part.name}.gz", folder / part.name) if path.is_file()), None)


def _read_part(folder: Path, part: Part) -> Tensor:
    path = _find(folder, part)
    if path is None:
        raise DataError(
            f"there is no {part.name}.gz (or {part.name}) in {folder}; accepted: --data FOLDER with the four files of "
            "MNIST, or --download to fetch them"
        )
    return read_idx(path, sha256=part.sha256)


def _download(path: Path, part: Part, mirrors: Sequence[str]) -> None:
    problems = []
    for mirror in mirrors:
        url = mirror.rstrip("/") + "/" + path.name
        try:
            # Checked under another name: what lies under its own name is right.
            trial = path.with_name(f"unchecked-{path.name}")
            with atomic_file(trial) as file:
                _copy(url, file)
            try:
                read_idx(trial, sha256=part.sha256)
                trial.replace(path)
                return
            finally:
                trial.unlink(missing_ok=True)
        except (OSError, HTTPException, ValueError) as problem:
            problems.append(f"{url}: {problem}")
    raise DataError(f"{path.name} could not be fetched into {path.parent}: {'; '.join(problems) or 'no mirrors given'}")


def _copy(url: str, file: IO[bytes]) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0) or None
        with progress(size, "B", desc=url.rsplit("/", 1)[-1], unit_scale=True, leave=False) as bar:
            for chunk in _chunks(response):
                file.write(chunk)
                bar.update(len(chunk))


def _chunks(response: IO[bytes]) -> Iterator[bytes]:
    while chunk := response.read(CHUNK):
        yield chunk
