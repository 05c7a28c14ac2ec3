"""Sequences of several lengths in one batch: padded, packed, and read backwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from linattn.errors import ArgumentError, refusal
from linattn.recurrence import check_lengths
from linattn.rnn.checks import check_sequence


class Sequences(NamedTuple):
    """A checked batch.

    Attributes:
        padded: `[B, T, F]`, 0 behind each sequence's end.
        lengths: int64 `[B]`; None if all have T steps.
        packed: what was given, if it was packed.
    """

    padded: Tensor
    lengths: Tensor | None
    packed: PackedSequence | None

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.padded.shape[0]

    def like_given(self, outputs: Tensor) -> Tensor | PackedSequence:
        """Return outputs `[B, T, H]`, packed as the inputs were if they were."""
        if self.packed is None or self.lengths is None:
            return outputs
        sorted_already = self.packed.unsorted_indices is None
        return pack_padded_sequence(outputs, self.lengths.cpu(), batch_first=True, enforce_sorted=sorted_already)

    def reversed(self) -> Sequences:
        """Turn every sequence around; padding stays where it is."""
        return self._replace(padded=reverse(self.padded, self.lengths))


def sequences(x: Tensor | PackedSequence, lengths: Tensor | None, input_size: int, weight: Tensor) -> Sequences:
    """Check a layer's inputs and bring them into one shape.

    Raises: ArgumentError (lengths beside a packed sequence, or not fitting), and what `check_sequence` raises.
    """
    packed = x if isinstance(x, PackedSequence) else None
    if packed is not None:
        if lengths is not None:
            raise refusal(
                ArgumentError, "a PackedSequence has lengths of its own", given="both", accepted="one of the two"
            )
        x, lengths = pad_packed_sequence(packed, batch_first=True)
    x = check_sequence(x, input_size, weight)
    if lengths is None:
        return Sequences(x, None, None)
    lengths = check_lengths(lengths, x.shape[0], x.shape[1]).to(x.device)
    # What stands in padding may be anything, NaN too, and must not meet a product.
    behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return Sequences(x.masked_fill(behind[..., None], 0), lengths, packed)


def reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse the first `lengths[b]` steps of each sequence of `[B, T, F]`; leave the others as they are.

    >>> reverse(torch.tensor([[[1], [2], [3]], [[4], [5], [0]]]), torch.tensor([3, 2]))[..., 0].tolist()
    [[3, 2, 1], [5, 4, 0]]
    """
    if lengths is None:
        return x.flip(1)
    step = torch.arange(x.shape[1], device=x.device)
    source = torch.where(step < lengths[:, None], lengths[:, None] - 1 - step, step)
    return x.gather(1, source[..., None].expand_as(x))
