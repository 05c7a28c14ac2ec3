"""What the operations share: declaring an op, the reference, the native and the Triton plumbing."""
