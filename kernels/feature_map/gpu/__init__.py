"""Backend "triton" of the feature-map ops (convention: kernels/common/op/stateful.py, maths: ../README.md).

Read downhill: `launcher` (which kernels a call runs) -> `call` and `launches` (how; `config` holds the tile sizes) ->
the kernels `sums` (a scan over chunks), `output` (forward), `gradient` (backward) and `recurrent` (token by token) ->
`layout` (which rows, keys and sums belong to a program) and `maps` (phi on tiles).
"""

from __future__ import annotations

from linattn.kernels.feature_map.gpu.launcher import backward, describe, forward

__all__ = ["backward", "describe", "forward"]
