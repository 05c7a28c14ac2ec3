"""What all Triton kernels share: how they are launched, on what they are tuned, how they round, how they loop."""
