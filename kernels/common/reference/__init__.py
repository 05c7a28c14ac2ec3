"""Attention whose similarity is a polynomial of degree at most 2 in the score s = scale * q.k, in plain PyTorch.

    out_i = sum_j p(s_ij) v_j / sum_j p(s_ij),        p(s) = c0 + c1 s + c2 s^2

Degree 2 is the quadratic kernel. Degree 1 with c = (0, 1, 0) is feature-map linear attention once q and k are mapped.
Read downhill: `problem` (tiles of the inputs) -> `features` (phi and its pullback) -> `state` (sums over keys) ->
`direct` (score tiles) and `scan` (chunks through the state).
"""
