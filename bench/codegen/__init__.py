"""Inspection of machine code: compile GPU kernels without a GPU and hold them against limits."""
