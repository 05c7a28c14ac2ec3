"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: real data that need no download.

Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI Machine Learning Repository.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.errors import MissingExtraError


class Digits(NamedTuple):
    """Images `[N, 1, 8, 8]` of mean 0 and variance 1 over the whole set, labels `[N]` int64."""

    images: Tensor
    labels: Tensor


def load_digits(dtype: torch.dtype = torch.float32) -> Digits:
    """All digits, in the order of the set.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "studies", "reading the handwritten digits") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=dtype).view(-1, 1, 8, 8)
    return Digits((images - images.mean()) / images.std(), torch.tensor(labels))
