"""Which kernels a call runs (launches.py runs them).

A chunk is a tile of rows here, so the table in `config` sets its size: `plan.chunk_size` is not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.gpu import direct
from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import with_unit_stride
from linattn.kernels.common.gpu.similarity import linear
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.varlen import check_sequences
from linattn.kernels.feature_map.gpu.call import Call
from linattn.kernels.feature_map.gpu.config import DECODED, configuration
from linattn.kernels.feature_map.gpu.launches import Rows, Sums, gradients_of_chunks, mapped, read, scan, walked

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs
    from linattn.kernels.feature_map.contract import Options


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute the op's results."""
    q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, _, plan = inputs
    before = [x.contiguous() for x in initial_state[1:]]
    with_state = return_state or bool(before)
    if runs_direct(plan.form, q.dtype, with_state):
        return *_direct(q, k, v, key_mask, cu_seqlens, options), [], []
    if cu_seqlens is not None:
        check_sequences(cu_seqlens, k.shape[2])
    call = Call(q, k, v, key_mask, cu_seqlens, options)
    out, l = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
    if walks(plan.form, q.shape[2], k.shape[2], options.is_causal, with_state):
        after = walked(call, out, l, before, return_state)
    else:
        keys = scan(call, call.config.chunk, before, keep_last=return_state)
        read(call, out, l, keys)
        after = keys.last
    state = [call.keys_seen(initial_state), *after] if return_state else []
    return out, l, state, []


def _direct(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    is_causal, q_offset, scale, name, normalize = options
    if name != "identity":
        q, k = mapped(with_unit_stride(q), with_unit_stride(k), name)
    similarity = linear(scale)
    problem = direct.DirectProblem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, similarity, normalize)
    return direct.forward(problem)


def backward(inputs: BackwardInputs) -> Gradients:
    """Compute the op's gradients."""
    dout, dstate, q, k, v, out, l, _, key_mask, cu_seqlens, initial_state, options, needs_grad, _ = inputs
    call = Call(q, k, v, key_mask, cu_seqlens, options)
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    want_initial = needs_grad[3] and bool(initial_state)
    before = [x.contiguous() for x in initial_state[1:]]
    after = [x.contiguous() for x in dstate]
    rows = Rows(with_unit_stride(dout), with_unit_stride(out), l.contiguous())
    chunk = call.config.backward_chunk
    keys, dinitial = Sums.none(), Sums.none()
    if needs_grad[0]:
        keys = scan(call, chunk, before, keep_last=False)
    if needs_grad[1] or needs_grad[2] or want_initial:
        dinitial = scan(call, chunk, after, keep_last=want_initial, rows=rows)
    if any(needs_grad[:3]):
        gradients_of_chunks(call, rows, keys, dinitial, (dq, dk, dv), needs_grad)
    return dq, dk, dv, dinitial.last if want_initial else []


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """The kernels that a call without a state runs, and their configuration."""
    config = configuration(architecture(q.device), q.dtype, q.shape[3], v.shape[3])
    if runs_direct(form, q.dtype, with_state=False):
        forward = direct.describe(q, v, "linear")
    elif walks(form, q.shape[2], k.shape[2], is_causal, with_state=False):
        forward = "walk: token by token, the state in registers"
    else:
        forward = f"scan_sums, read_sums: chunks of {config.chunk} keys"
    return f"Triton ({architecture(q.device)}): {forward}; backward in chunks of {config.backward_chunk}"


def runs_direct(form: str, dtype: torch.dtype, with_state: bool) -> bool:
    """Whether the scores of all pairs are computed. States are read and made in chunks, and fp16 needs TF32's range for
    features that grow fast.
    """
    return form == "direct" and not with_state and dtype != torch.float16


def walks(form: str, Tq: int, Tk: int, is_causal: bool, with_state: bool) -> bool:
    """Whether tokens are walked one by one: on request, or because they are few and there is a state to update."""
    few = with_state and max(Tq, Tk) <= DECODED and (is_causal or Tq == Tk == 1)
    return form == "recurrent" or few
