"""Linear probe: the accuracy of a linear classifier on frozen codes measures the information they make explicit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.errors import ArgumentError, DataError, ShapeError, refusal

if TYPE_CHECKING:
    from linattn.autoencoders.data.synthetic import Split


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is trained: Adam on the cross entropy of softmax(code W + b), from scratch each time.

    Attributes:
        labels: samples to learn from, None for all that there are.
        epochs: passes over them.
        batch: samples in a step.
        learning_rate: of Adam.

    Raises:
        ArgumentError: one of them is not positive.
    """

    labels: int | None = None
    epochs: int = 50
    batch: int = 200
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("labels", "epochs", "batch", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise refusal(ArgumentError, "the probe cannot be trained", given=f"{name}={value}", accepted="above 0")


def choose_labelled(split: Split, count: int | None, seed: int) -> Tensor:
    """Draw the indices of `count` samples of the split to label, without looking at them; all for None.

    Raises:
        DataError: the split has no labels, or fewer than asked for.
    """
    if not len(split.y):
        raise refusal(
            DataError, "the samples have no labels", given="none", accepted="one for every sample, which a probe needs"
        )
    if count is not None and count > len(split.y):
        raise DataError(f"{count} labelled samples were asked for; accepted: at most {len(split.y)}, all there are")
    order = torch.randperm(len(split.y), generator=torch.Generator().manual_seed(seed))
    return order[:count].to(split.y.device)


def probe_accuracy(
    codes: Tensor, y: Tensor, test_codes: Tensor, test_y: Tensor, config: ProbeConfig, *, classes: int, seed: int = 0
) -> Tensor:
    """Train one probe for each of R encoders and return their accuracies on the test codes, `[R]`, 0 to 1.

    Each probe ends as if it were alone. They run as one batched product because that is faster.

    Args:
        codes: `[R, n, k]` of the labelled samples.
        y: their labels `[n]`, int64 from 0 to `classes` - 1.
        test_codes: `[R, m, k]` of the test samples.
        test_y: their labels `[m]`.
        config: see `ProbeConfig`; its `labels` is not used here, see `choose_labelled`.
        classes: C, number of classes.
        seed: of the first weights and the order of the batches.

    6 R n k C flops an epoch.

    Raises:
        ShapeError: codes and labels do not fit each other.
        DataError: no labels, labels outside the classes, codes that are not finite.

    Source: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".

    Example:
        >>> y = torch.arange(60) % 3
        >>> codes = torch.randn(2, 60, 4) + 5 * torch.eye(3, 4)[y]
        >>> probe_accuracy(codes, y, codes, y, ProbeConfig(epochs=100, learning_rate=0.1), classes=3).min().item() > 0.9
        True
    """
    _check(codes, y, test_codes, test_y, classes)
    R, n, k = codes.shape
    generator = torch.Generator().manual_seed(seed)
    bound = k**-0.5

    def start(*shape: int) -> Tensor:
        values = (2 * torch.rand(shape, generator=generator) - 1) * bound
        parameter: Tensor = values.to(codes.device, codes.dtype).repeat(R, 1, 1).requires_grad_()
        return parameter

    # All begin alike: what differs in the end is due to the codes.
    weight, bias = start(k, classes), start(1, classes)
    optimizer = torch.optim.Adam([weight, bias], lr=config.learning_rate, fused=codes.device.type in ("cpu", "cuda"))
    whole = config.batch >= n
    with torch.enable_grad():
        for _ in range(config.epochs):
            # With a single batch its order does not matter, and gathering it would cost more than the step.
            order = torch.arange(n) if whole else torch.randperm(n, generator=generator)
            for index in order.to(codes.device).split(config.batch):  # type: ignore[no-untyped-call]
                x, target = (codes, y) if whole else (codes[:, index], y[index])
                logits = torch.baddbmm(bias, x, weight)
                # Summed over the probes, so that each gets the gradient of its own mean.
                loss = F.cross_entropy(logits.flatten(0, 1), target.repeat(R), reduction="sum") / len(target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    with torch.no_grad():
        found = torch.baddbmm(bias, test_codes, weight).argmax(-1)
    return (found == test_y).double().mean(-1)


def _check(codes: Tensor, y: Tensor, test_codes: Tensor, test_y: Tensor, classes: int) -> None:
    if codes.ndim != 3 or test_codes.ndim != 3 or codes.shape[::2] != test_codes.shape[::2]:
        raise ShapeError(
            f"codes have shapes {list(codes.shape)} and {list(test_codes.shape)}; accepted: [R, n, k] and [R, m, k]"
        )
    for what, given, labels in (("codes", codes, y), ("test codes", test_codes, test_y)):
        if not len(labels):
            raise refusal(
                DataError,
                f"the {what} have no labels",
                given="none",
                accepted="one for every sample, which a probe needs",
            )
        if labels.shape != (given.shape[1],):
            raise ShapeError(f"the {what} have labels of shape {list(labels.shape)}; accepted: [{given.shape[1]}]")
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"labels of the {what} reach from {labels.min()} to {labels.max()}; accepted: 0 to {classes - 1}"
            )
        if not given.isfinite().all():
            raise DataError(f"the {what} have entries that are NaN or infinite; accepted: finite numbers only")
