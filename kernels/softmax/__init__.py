"""Softmax attention: sim = exp(scale * q.k)."""
