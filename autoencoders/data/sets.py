"""Sets of samples by name, in memory as tensors: digits, mnist, synthetic, or a file of one's own.

What is kept apart: encoders learn from `train` without its labels, losses are measured on `valid`, probes learn from
labelled samples of `valid` and are scored on `test`, which nothing is ever fitted to.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linattn.autoencoders.data.mnist import load_mnist
from linattn.autoencoders.data.synthetic import Split, synthetic_set
from linattn.errors import ArgumentError, DataError, MissingExtraError, refusal, unknown_name

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("digits", "mnist", "synthetic", "file")


class SampleSet(NamedTuple):
    """Three disjoint splits of samples `x [n, F]` float32 with labels `y [n]` int64, empty where there are none.

    Attributes:
        name: as given to `load_set`.
        train, valid, test: see the module.
        image_shape: height and width with height * width = F, None for what is not an image.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    image_shape: tuple[int, int] | None

    @property
    def input_size(self) -> int:
        """Size F of a sample."""
        return self.train.x.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return int(max(split.y.max() for split in self[1:4])) + 1 if self.has_labels else 0

    @property
    def has_labels(self) -> bool:
        """Whether every sample of every split has a label."""
        return all(len(split.y) for split in self[1:4])

    def to(self, device: torch.device) -> SampleSet:
        """Move the set to a device."""
        train, valid, test = (Split(split.x.to(device), split.y.to(device)) for split in self[1:4])
        return self._replace(train=train, valid=valid, test=test)


def load_set(
    name: str, *, data: Path | None = None, seed: int = 0, download: bool = False, variance_scale: float = 10.0
) -> SampleSet:
    """Load a set and split it; the same seed splits (and draws) alike.

    Args:
        name: "digits": scikit-learn's 1,797 digits of 8 x 8 pixels, 60 / 20 / 20 %.
            "mnist": its 60,000 training images 60 / 40 %, its own 10,000 test images.
            "synthetic": see `synthetic_set`, 70 / 20 / 10 %.
            "file": an `.npz` file with x `[n, ...]` and, if there are labels, y `[n]` integers from 0; 60 / 20 / 20 %.
            Pixels of images are scaled to 0 ... 1.
        data: the folder of MNIST's files or the `.npz` file; the other sets take none.
        seed: of the split, and of what is drawn.
        download: fetch MNIST if it is not there.
        variance_scale: of the synthetic set.

    Raises:
        ArgumentError: an unknown name; `data` for a set that takes none, or none for a file.
        DataError: files missing, damaged or not what was expected; entries that are NaN or infinite.
        MissingExtraError: digits without scikit-learn.

    Example:
        >>> data = load_set("synthetic")
        >>> data.train.x.shape, data.classes, data.image_shape
        (torch.Size([14000, 100]), 2, None)
    """
    if name not in NAMES:
        raise unknown_name("set", name, NAMES)
    if data is not None and name not in ("mnist", "file"):
        raise refusal(
            ArgumentError,
            f"the set {name!r} takes no data",
            given=f"data={str(data)!r}",
            accepted="data for 'mnist' or 'file'",
        )
    generator = torch.Generator().manual_seed(seed)
    if name == "synthetic":
        drawn = synthetic_set(variance_scale=variance_scale, generator=generator)
        return SampleSet(name, *drawn[:3], None)
    if name == "mnist":
        mnist = load_mnist(data, download=download)
        order = torch.randperm(len(mnist.train_labels), generator=generator)
        train, valid = _pick(_pixels(mnist.train_images, 255), mnist.train_labels, order.tensor_split([36_000]))
        return SampleSet(name, train, valid, Split(_pixels(mnist.test_images, 255), mnist.test_labels), (28, 28))
    if name == "digits":
        x, y = load_digits()
        return _three_way(name, x, y, (8, 8), generator)
    if data is None:
        raise refusal(
            ArgumentError,
            "the set 'file' is without data",
            given="none",
            accepted="data, an .npz file with x and maybe y",
        )
    x, y = _read_npz(data)
    return _three_way(name, x, y, None, generator)


def load_digits() -> Split:
    """Load scikit-learn's 1,797 handwritten digits, `[1797, 64]`, pixels 0 ... 1 in steps of 1/16, in their order.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI Machine Learning Repository.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "studies", "reading the handwritten digits") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    return Split(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))


def check_samples(x: Tensor, source: str) -> None:
    """Raise DataError unless x `[n, F]` holds at least one sample and only finite numbers; `source` names it."""
    if x.ndim != 2 or x.numel() == 0:
        raise DataError(f"{source} has shape {list(x.shape)}; accepted: [n, F] with at least one sample and entry")
    wrong = int((~x.isfinite()).sum())
    if wrong:
        raise DataError(f"{source} has {wrong} entries that are NaN or infinite; accepted: finite numbers only")


def check_labels(data: SampleSet) -> None:
    """Raise DataError unless every split has labels, as a probe needs."""
    if not data.has_labels:
        raise DataError(
            f"the set {data.name!r} has no labels; a probe needs one for every sample, as y in an .npz file"
        )


def _pixels(images: Tensor, white: int) -> Tensor:
    return images.flatten(1).float() / white


def _three_way(
    name: str, x: Tensor, y: Tensor, image_shape: tuple[int, int] | None, generator: torch.Generator
) -> SampleSet:
    if len(x) < 5:
        raise DataError(f"the set {name!r} has {len(x)} samples; accepted: at least 5, so that no split is empty")
    cuts = [round(0.6 * len(x)), round(0.8 * len(x))]
    parts = torch.randperm(len(x), generator=generator).tensor_split(cuts)
    train, valid, test = _pick(x, y, parts)
    return SampleSet(name, train, valid, test, image_shape)


def _pick(x: Tensor, y: Tensor, parts: tuple[Tensor, ...]) -> list[Split]:
    return [Split(x[part], y[part] if len(y) else y) for part in parts]


def _read_npz(path: Path) -> Split:
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; accepted: an .npz file with x and maybe y") from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}; accepted: an .npz file with x and maybe y") from error
    if "x" not in found:
        raise DataError(f"{path} holds {sorted(found)}; accepted: x [n, ...] and maybe y [n]")
    x, y = found["x"], found.get("y", np.empty(0, np.int64))
    if x.dtype.kind not in "biuf" or x.ndim < 2 or not x.size:
        raise DataError(f"x in {path} has dtype {x.dtype} and shape {list(x.shape)}; accepted: real numbers [n, ...]")
    samples = torch.tensor(x.reshape(len(x), -1), dtype=torch.float32)
    check_samples(samples, f"x in {path}")
    if "y" in found and (y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0):
        raise DataError(
            f"y in {path} has dtype {y.dtype} and shape {list(y.shape)}; accepted: integers from 0, [{len(x)}]"
        )
    return Split(samples, torch.tensor(y.astype(np.int64)))
