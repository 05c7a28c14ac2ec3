"""Schemas, fakes and backends of the softmax ops."""

from __future__ import annotations

from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.backend import Backend, anything, triton
from linattn.kernels.common.op.registration import define, implementation

# In the order in which "auto" tries them, after PyTorch's own: flash and cuDNN kernels of the vendor are what users
# compare with and expect. "triton" is for what those cannot take: key_mask, packed sequences, q_offset, D != M.
BACKENDS = {
    "triton": Backend("linattn.kernels.softmax.gpu", triton),
    "reference": Backend("linattn.kernels.softmax.reference", anything, "plain PyTorch"),
}

# lse: log-sum-exp of the scores of each row [B, H, T], -inf for a row that sees no key.
_OPTIONS = "Tensor? key_mask, Tensor? cu_seqlens, bool is_causal, SymInt q_offset, float scale, str backend"
FORWARD = f"softmax_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)"
BACKWARD = f"""softmax_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}
) -> (Tensor dq, Tensor dk, Tensor dv)"""


def _forward_fake(q, k, v, *options):
    return empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)


def _backward_fake(dout, q, k, v, *rest):
    return tuple(empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))


define(FORWARD, _forward_fake, lambda *xs: implementation(BACKENDS, xs[-1]).forward(*xs[:-1]))
define(BACKWARD, _backward_fake, lambda *xs: implementation(BACKENDS, xs[-1]).backward(*xs[:-1]))
