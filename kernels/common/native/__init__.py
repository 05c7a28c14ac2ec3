"""Define what the native kernels share: the C++ plumbing, and the binding that calls them from Python."""
