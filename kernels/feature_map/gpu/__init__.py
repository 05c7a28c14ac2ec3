"""Backend "triton" of the feature-map ops (convention: kernels/common/op/stateful.py, maths: ../README.md).

Read downhill: `launch` (which kernels a call runs, then one launch a function; `kernel_args` and `config` hold what
they are told) -> the kernels `chunk_state` (a scan over chunks), `chunk_output` (forward), `chunk_backward` (its terms
in `chunk_backward_terms`) and `recurrent` (token by token) -> `chunk_schedule` (which queries, keys and states belong
to a program) and `maps` (phi on tiles).
"""

from __future__ import annotations

from linattn.kernels.feature_map.gpu.launch import backward, describe, forward

__all__ = ["backward", "describe", "forward"]
