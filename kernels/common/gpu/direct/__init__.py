"""The direct form: every pair's score is computed, a tile at a time, and none is kept."""

from .launcher import Problem, backward, describe, forward

__all__ = ["Problem", "backward", "describe", "forward"]
