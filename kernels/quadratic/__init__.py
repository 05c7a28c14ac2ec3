"""Quadratic-kernel attention: sim = c0 + c1 s + c2 s^2 with s = scale * q.k."""
