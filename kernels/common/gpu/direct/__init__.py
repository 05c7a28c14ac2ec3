"""The direct form: every pair's score is computed, a tile at a time, and none is kept."""

from linattn.kernels.common.gpu.direct.launcher import Problem, backward, describe, forward

__all__ = ["Problem", "backward", "describe", "forward"]
