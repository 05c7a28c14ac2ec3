"""One call of a polynomial similarity: its tiles, its score function, and how its rows are normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from linattn.kernels.common.op.conditioning import complete_square
from linattn.kernels.common.reference.tiles import Tiles, divided

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.common.op.conditioning import Coefficients


@dataclass(frozen=True, kw_only=True)
class Problem(Tiles):
    """Tiles, and p(s) = c0 + c1 s + c2 s^2; degree 1 has only the term c1 s."""

    coefficients: Coefficients
    normalize: bool
    degree: int

    def similarity(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """p(s) of a tile, and dp/ds (None where it is the constant c1).

        To normalise, degree 2 is evaluated as c2 (s + b)^2 + r, which cannot turn negative by rounding where the
        polynomial touches zero. Otherwise its root may be far from all scores, and the square would lose their digits.
        """
        c0, c1, c2 = self.coefficients
        s = x @ k.mT
        if self.degree == 1:
            return s.mul_(c1), None
        if not self.normalize:
            return (c2 * s + c1) * s + c0, s.mul_(2 * c2).add_(c1)
        b, r = complete_square(self.coefficients)
        t = s.add_(b)
        p = t.square()
        if c2 != 1:
            p.mul_(c2)
        if r != 0:
            p.add_(r)
        return p, t.mul_(2 * c2)

    # Rows of the result.

    def store(self, out: Tensor, row_sums: Tensor, i0: int, i1: int, acc: Tensor, l: Tensor) -> None:
        """Normalise a tile of sums and write it: out `[B, Hq, Tq, M]`, row_sums `[B, Hq, Tq]`."""
        if self.normalize:
            acc = divided(acc, l)
        out[:, :, i0:i1].copy_(self.unfold(acc))
        row_sums[:, :, i0:i1].copy_(self.unfold(l))

    def row_gradients(self, dout: Tensor, out: Tensor, row_sums: Tensor, i0: int, i1: int) -> tuple[Tensor, Tensor]:
        """DO' = dO / l and delta = rowsum(dO' * out), the gradients to the sum of p v and (negated) to the sum of p."""
        do = self.fold(dout[:, :, i0:i1])
        if not self.normalize:
            return do, do.new_zeros(do.shape[:-1])
        do = divided(do, self.fold(row_sums[:, :, i0:i1]))
        return do, (do * self.fold(out[:, :, i0:i1])).sum(-1)
