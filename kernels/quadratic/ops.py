"""Schemas, fakes and backends of the quadratic-kernel ops."""

from __future__ import annotations

import torch

from ..common.allocation import accumulation_dtype, empty_in_storage_order, empty_row_sums
from ..common.registration import define

BACKENDS = {"reference": "linattn.kernels.quadratic.reference"}

# initial_state, state: [n, k_sum, kk, v_sum, kv, kkv] (linattn/state.py) or [].
# dstate, dinitial_state: the same without n.
# l: row sums [B, H, T]. saved: what a backend keeps for its backward beyond out and l; the reference keeps nothing.
# form: "direct", "chunked" or "recurrent". chunk_size: 0 lets the backend choose.
_OPTIONS = "bool is_causal, SymInt q_offset, float scale, float c0, float c1, float c2, bool normalize"
FORWARD = f"""quadratic_fwd(
    Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, Tensor[] initial_state,
    {_OPTIONS}, bool return_state, str form, SymInt chunk_size, str backend
) -> (Tensor out, Tensor l, Tensor[] state, Tensor[] saved)"""
BACKWARD = f"""quadratic_bwd(
    Tensor dout, Tensor[] dstate, Tensor q, Tensor k, Tensor v, Tensor out, Tensor l, Tensor[] saved,
    Tensor? key_mask, Tensor? cu_seqlens, Tensor[] initial_state,
    {_OPTIONS}, str form, SymInt chunk_size, str backend
) -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dinitial_state)"""


def state_shapes(sequences: int, Hkv: int, D: int, M: int) -> list[tuple[int, ...]]:
    """Shapes of the canonical state's tensors, n first."""
    sizes: list[tuple[int, ...]] = [(D,), (D, D), (M,), (D, M), (D * (D + 1) // 2, M)]
    return [(sequences,)] + [(sequences, Hkv, *size) for size in sizes]


def _forward_fake(q, k, v, key_mask, cu_seqlens, initial_state, *options):
    return_state = options[7]
    state = []
    if return_state:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        n, *sums = state_shapes(sequences, k.shape[1], k.shape[3], v.shape[3])
        state = [k.new_empty(n, dtype=torch.int64)]
        state += [k.new_empty(shape, dtype=accumulation_dtype(k.dtype)) for shape in sums]
    return empty_in_storage_order(q, v.shape[3]), empty_row_sums(q), state, []


def _backward_fake(dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state, *options):
    gradients = [empty_in_storage_order(x, x.shape[3]) for x in (q, k, v)]
    return *gradients, [x.new_empty(x.shape) for x in initial_state[1:]]


define(FORWARD, _forward_fake, BACKENDS, "forward")
define(BACKWARD, _backward_fake, BACKENDS, "backward")
