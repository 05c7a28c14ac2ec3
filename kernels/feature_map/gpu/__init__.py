"""Backend "triton" of the feature-map ops (convention: kernels/common/stateful.py, maths: ../README.md).

Read downhill: `layout` (which rows, keys and sums belong to a program) and `maps` (phi on tiles) -> `sums` (a scan over
chunks) -> `output` (forward) and `gradient` (backward); `recurrent` walks tokens; `config` holds the tile sizes.
"""

from __future__ import annotations

from .launcher import backward, describe, forward

__all__ = ["backward", "describe", "forward"]
