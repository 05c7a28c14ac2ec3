"""The direct form: all scores are computed, a tile at a time, and none is kept."""

from linattn.kernels.common.gpu.direct.launch import DirectProblem, backward, describe, forward

__all__ = ["DirectProblem", "backward", "describe", "forward"]
