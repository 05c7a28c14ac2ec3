"""Share among all Triton kernels how they are launched, on what they are tuned, how they round and loop."""
