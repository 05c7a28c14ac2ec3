"""scikit-learn's 1,797 handwritten digits as images: real data that need no download."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.autoencoders.data import sets


class Digits(NamedTuple):
    """Images `[N, 1, 8, 8]` of mean 0 and variance 1 over the whole set, labels `[N]` int64."""

    images: Tensor
    labels: Tensor


def load_digits(dtype: torch.dtype = torch.float32) -> Digits:
    """Load all digits, in the order of the set.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    digits = sets.load_digits()
    images = digits.x.to(dtype).view(-1, 1, 8, 8)
    return Digits((images - images.mean()) / images.std(), digits.y)
