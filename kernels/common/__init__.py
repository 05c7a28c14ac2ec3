"""Shared by the operations: how an op is declared, the reference, the native and the Triton plumbing."""
