"""Tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under a header: words to the left, numbers (four digits) to the right.

    Example:
        >>> print(text_table(("D", "variance"), [(16, 15.98765), (1024, 1023.0)]))
           D  variance
          16     15.99
        1024      1023
    """
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    left = [all(isinstance(row[index], str) for row in rows) for index in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in (list(header), *cells)
    )
