"""linattn.kernels"""
