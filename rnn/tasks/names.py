"""Surnames by language: files, spelling, split, and what train and test share."""

from __future__ import annotations

import json
import string
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALPHABET = string.ascii_letters + " .,;'"
PADDING = len(ALPHABET)
VOCABULARY = len(ALPHABET) + 1
EMBEDDED = Path(__file__).with_name("embedded_names.json")
ACCEPTED = "accepted: a folder or a zip archive of UTF-8 files LANGUAGE.txt, a name a line, of two languages or more"


@dataclass(frozen=True)
class Names:
    """Names with their languages.

    Attributes:
        languages: sorted; a label is an index into them.
        names: as they were spelled by `plain`.
        labels: of the same length.

    >>> names = embedded_names()
    >>> len(names.languages), len(names.names)
    (18, 432)
    """

    languages: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def split(self, share: float = 0.8, seed: int = 0) -> tuple[Names, Names]:
        """Shuffle by `seed` and cut: the first `share`, and the rest."""
        order = torch.randperm(len(self.names), generator=torch.Generator().manual_seed(seed)).tolist()
        cut = int(share * len(order))
        return self._chosen(order[:cut]), self._chosen(order[cut:])

    def _chosen(self, indices: Sequence[int]) -> Names:
        return Names(self.languages, tuple(self.names[i] for i in indices), tuple(self.labels[i] for i in indices))

    def counts(self) -> list[int]:
        """Count the names of each language."""
        return [self.labels.count(label) for label in range(len(self.languages))]


@dataclass(frozen=True)
class Duplicates:
    """Overlaps that make a test look better, or its best possible result worse, than it seems.

    Attributes:
        test_in_train: test names whose spelling stands in the training set, under any language.
        test_same_label: those of them that stand there under the same language.
        ambiguous: different spellings that stand in the data under two languages or more.
        repeated: entries that repeat an earlier one, name and language.
    """

    test_in_train: int
    test_same_label: int
    ambiguous: int
    repeated: int


def load_names(path: Path) -> Names:
    """Read `LANGUAGE.txt` files from a folder, or from a zip archive at any depth.

    Raises: DataError for a missing or damaged source, bytes that are not UTF-8 (which file, at which byte), a file
    without a name, one language only, two files of one language.
    """
    languages: dict[str, list[str]] = {}
    for source, content in _text_files(path):
        language = Path(source).stem
        try:
            lines = content.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{source} in {path} is not UTF-8 (at byte {error.start}); {ACCEPTED}") from error
        if language in languages:
            raise DataError(f"there are two files {language}.txt in {path}; {ACCEPTED}")
        languages[language] = [name for name in map(plain, lines) if name]
        if not languages[language]:
            raise DataError(f"{source} in {path} holds no name; {ACCEPTED}")
    if len(languages) < 2:
        raise DataError(f"{path} holds {len(languages)} files LANGUAGE.txt; {ACCEPTED}")
    return _labelled(languages)


def embedded_names() -> Names:
    """Return 24 common surnames of each of 18 languages, written for this project: enough to try, too few to learn."""
    return _labelled(json.loads(EMBEDDED.read_text(encoding="utf-8")))


def _text_files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        if path.is_dir():
            for file in sorted(path.glob("*.txt")):
                yield file.name, file.read_bytes()
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    # Archives made on a Mac carry a second, invisible file beside every one.
                    if name.endswith(".txt") and not Path(name).name.startswith("."):
                        yield name, archive.read(name)
        else:
            what = "is neither a folder nor a zip archive" if path.exists() else "does not exist"
            raise DataError(f"{path} {what}; {ACCEPTED}")
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}; {ACCEPTED}") from error


def _labelled(languages: dict[str, list[str]]) -> Names:
    ordered = tuple(sorted(languages))
    pairs = [(name, label) for label, language in enumerate(ordered) for name in languages[language]]
    return Names(ordered, tuple(name for name, _ in pairs), tuple(label for _, label in pairs))


def plain(name: str) -> str:
    """Spell a name in the alphabet a-z A-Z and " .,;'": accents are taken off, everything else is left out.

    >>> plain("Ślusàrski"), plain(" Au-Yong ")
    ('Slusarski', 'AuYong')
    """
    return "".join(c for c in unicodedata.normalize("NFD", name) if c in ALPHABET).strip()


def encode(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encode names as tokens int64 `[B, T]`, padded to the longest name, and lengths int64 `[B]`.

    Raises: DataError for a name of which nothing is left in the alphabet.

    >>> tokens, lengths = encode(["Bo", "a"])
    >>> tokens.tolist(), lengths.tolist()
    ([[27, 14], [0, 57]], [2, 1])
    """
    spelled = [plain(name) for name in names]
    for given, kept in zip(names, spelled, strict=True):
        if not kept:
            raise DataError(f"{given!r} has no letter that the model knows; accepted: letters a to z, accented or not")
    lengths = torch.tensor([len(name) for name in spelled])
    tokens = torch.full((len(spelled), int(lengths.max())), PADDING)
    for row, name in zip(tokens, spelled, strict=True):
        row[: len(name)] = torch.tensor([ALPHABET.index(c) for c in name])
    return tokens, lengths


def duplicates(train: Names, test: Names) -> Duplicates:
    """Count what the two parts share."""
    known = set(train.names)
    pairs = list(zip(train.names + test.names, train.labels + test.labels, strict=True))
    in_train = set(zip(train.names, train.labels, strict=True))
    spellings: dict[str, set[int]] = {}
    for name, label in pairs:
        spellings.setdefault(name, set()).add(label)
    return Duplicates(
        test_in_train=sum(name in known for name in test.names),
        test_same_label=sum(pair in in_train for pair in zip(test.names, test.labels, strict=True)),
        ambiguous=sum(len(labels) > 1 for labels in spellings.values()),
        repeated=len(pairs) - len(set(pairs)),
    )
