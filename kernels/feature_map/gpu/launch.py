"""Which kernels a call runs, then one launch a function, and what passes between them.

A chunk is a tile of queries here, so the table in `config` sets its size: `plan.chunk_size` is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu import direct
from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import block_size, launch, strides_bht, with_unit_stride
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE
from linattn.kernels.common.gpu.similarity import linear
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.varlen import check_sequences
from linattn.kernels.feature_map.gpu.chunk_backward import chunk_backward_kernel
from linattn.kernels.feature_map.gpu.chunk_output import chunk_output_kernel
from linattn.kernels.feature_map.gpu.chunk_state import chunk_state_kernel
from linattn.kernels.feature_map.gpu.config import FEW_TOKENS, configuration, splits_for
from linattn.kernels.feature_map.gpu.kernel_args import FeatureMapCall, State
from linattn.kernels.feature_map.gpu.maps import map_features_kernel
from linattn.kernels.feature_map.gpu.recurrent import recurrent_kernel

if TYPE_CHECKING:
    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs
    from linattn.kernels.feature_map.contract import Options

TOKENS_MAPPED = 32
"""Tokens that one program of `map_features_kernel` maps."""
STATE_ENTRIES = 8192
"""Entries of a state in one program's registers, in the recurrent form."""


class GradOutputs(NamedTuple):
    """The gradient to the output, and what the forward pass made of the queries."""

    dout: Tensor
    out: Tensor
    l: Tensor


class ChunkStates(NamedTuple):
    """The states of a scan: rounded S and fp32 z of every chunk and split, and [z, S] after the last step."""

    S: Tensor | None
    z: Tensor | None
    final: State
    splits: int


NO_STATES = ChunkStates(None, None, [], 1)


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute out, l and the state after the call if it is asked for; nothing is saved."""
    q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, _, plan = inputs
    initial = [x.contiguous() for x in initial_state[1:]]
    with_state = return_state or bool(initial)
    if runs_direct(plan.form, q.dtype, with_state):
        return *run_direct(q, k, v, key_mask, cu_seqlens, options), [], []
    if cu_seqlens is not None:
        check_sequences(cu_seqlens, k.shape[2])
    call = FeatureMapCall(q, k, v, key_mask, cu_seqlens, options)
    out, l = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
    if runs_recurrent(plan.form, q.shape[2], k.shape[2], options.is_causal, with_state):
        final = run_recurrent(call, out, l, initial, return_state)
    else:
        states = scan_keys(call, call.config.output.BLOCK_T, initial, keep_final=return_state)
        run_chunk_output(call, out, l, states)
        final = states.final
    state = [call.count_keys(initial_state), *final] if return_state else []
    return out, l, state, []


def backward(inputs: BackwardInputs) -> Gradients:
    """Compute dq, dk, dv, those that are not needed holding anything, and the gradients to the initial state."""
    dout, dstate, q, k, v, out, l, _, key_mask, cu_seqlens, initial_state, options, needs_grad, _ = inputs
    call = FeatureMapCall(q, k, v, key_mask, cu_seqlens, options)
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    needs_initial = needs_grad[3] and bool(initial_state)
    grads = GradOutputs(with_unit_stride(dout), with_unit_stride(out), l.contiguous())
    chunk = call.config.backward.BLOCK_T
    states, dstates = NO_STATES, NO_STATES
    if needs_grad[0]:
        states = scan_keys(call, chunk, [x.contiguous() for x in initial_state[1:]], keep_final=False)
    if needs_grad[1] or needs_grad[2] or needs_initial:
        dstates = scan_queries(call, chunk, grads, [x.contiguous() for x in dstate], keep_final=needs_initial)
    if any(needs_grad[:3]):
        run_chunk_backward(call, grads, states, dstates, (dq, dk, dv), needs_grad)
    return dq, dk, dv, dstates.final if needs_initial else []


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """Describe the kernels that a call without a state runs, and their configuration."""
    config = configuration(architecture(q.device), q.dtype, q.shape[3], v.shape[3])
    if runs_direct(form, q.dtype, with_state=False):
        forward = direct.describe(q, v, "linear")
    elif runs_recurrent(form, q.shape[2], k.shape[2], is_causal, with_state=False):
        forward = "recurrent_kernel: token by token, the state in registers"
    else:
        forward = f"chunk_state_kernel, chunk_output_kernel: chunks of {config.output.BLOCK_T} keys"
    return f"Triton ({architecture(q.device)}): {forward}; backward in chunks of {config.backward.BLOCK_T}"


def runs_direct(form: str, dtype: torch.dtype, with_state: bool) -> bool:
    """Whether all scores are computed. States are made and multiplied in chunks, and fp16 needs TF32's range for
    features that grow fast.
    """
    return form == "direct" and not with_state and dtype != torch.float16


def runs_recurrent(form: str, Tq: int, Tk: int, is_causal: bool, with_state: bool) -> bool:
    """Whether the state goes token by token: on request, or because tokens are few and there is a state to update."""
    few = with_state and max(Tq, Tk) <= FEW_TOKENS and (is_causal or Tq == Tk == 1)
    return form == "recurrent" or few


def run_direct(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Return out and l of the direct form: phi beforehand, then tiles of scores (common/gpu/direct)."""
    is_causal, q_offset, scale, name, normalize = options
    if name != "identity":
        q, k = map_features(with_unit_stride(q), with_unit_stride(k), name)
    similarity = linear(scale)
    problem = direct.DirectProblem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, similarity, normalize)
    return direct.forward(problem)


def map_features(q: Tensor, k: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return phi of q and of k."""
    fq, fk = (empty_in_storage_order(x, x.shape[3]) for x in (q, k))
    q_tiles, k_tiles = (x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], TOKENS_MAPPED) for x in (q, k))
    launch(
        map_features_kernel,
        (q_tiles + k_tiles,),
        num_warps=4,
        num_stages=1,
        q_ptr=q,
        k_ptr=k,
        fq_ptr=fq,
        fk_ptr=fk,
        stride_q=strides_bht(q),
        stride_k=strides_bht(k),
        stride_fq=strides_bht(fq),
        stride_fk=strides_bht(fk),
        H=q.shape[1],
        Hkv=k.shape[1],
        Tq=q.shape[2],
        Tk=k.shape[2],
        num_query_tiles=q_tiles,
        D=q.shape[3],
        BLOCK_T=TOKENS_MAPPED,
        BLOCK_D=block_size(q.shape[3]),
        MAP=name,
        IN_DTYPE=TRITON_DTYPE[q.dtype],
    )
    return fq, fk


def run_recurrent(call: FeatureMapCall, out: Tensor, l: Tensor, initial: State, return_state: bool) -> State:
    """Fill out and l token by token; return z and S afterwards, if they are asked for."""
    columns = min(block_size(call.M), max(16, STATE_ENTRIES // block_size(call.D)))
    final = call.empty_state(call.num_seqs) if return_state else []
    initial_z, initial_S = initial or (None, None)
    final_z, final_S = final or (None, None)
    launch(
        recurrent_kernel,
        (triton.cdiv(call.M, columns) * call.Hkv * call.num_seqs,),
        num_warps=4,
        num_stages=1,
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        o_ptr=out,
        l_ptr=l,
        initial_S_ptr=initial_S,
        initial_z_ptr=initial_z,
        final_S_ptr=final_S,
        final_z_ptr=final_z,
        stride_q=strides_bht(call.q),
        stride_k=strides_bht(call.k),
        stride_v=strides_bht(call.v),
        stride_o=strides_bht(out),
        BLOCK_D=block_size(call.D),
        BLOCK_DV=columns,
        HAS_INITIAL=bool(initial),
        HAS_FINAL=return_state,
        **call.shared,
    )
    return final


def scan_keys(call: FeatureMapCall, chunk: int, initial: State, keep_final: bool) -> ChunkStates:
    """Return the states before every chunk, after the `initial` one."""
    return _scan(call, chunk, initial, keep_final, None)


def scan_queries(call: FeatureMapCall, chunk: int, grads: GradOutputs, initial: State, keep_final: bool) -> ChunkStates:
    """Return the gradients to the states after every chunk; `initial`: those to the state after the call."""
    return _scan(call, chunk, initial, keep_final, grads)


def _scan(call: FeatureMapCall, chunk: int, initial: State, keep_final: bool, grads: GradOutputs | None) -> ChunkStates:
    # Over 60 lines: one launch, written out.
    config = call.config.state if grads is None else call.config.state_gradient
    x, y = (call.k, call.v) if grads is None else (call.q, grads.dout)
    out, l = (y, None) if grads is None else (grads.out, grads.l)
    features = min(config.BLOCK_D, block_size(call.D))
    slices = triton.cdiv(call.D, features)
    mean_length = x.shape[2] * call.k.shape[0] // call.num_seqs
    splits = splits_for(call.config, call.num_seqs * call.Hkv * slices, triton.cdiv(mean_length, chunk))
    num_states = call.num_states(chunk, splits)
    S = call.k.new_empty(num_states, call.Hkv, call.D, call.M, dtype=call.product_dtype)
    z = call.k.new_empty(num_states, call.Hkv, call.D, dtype=torch.float32)
    final = call.empty_state(call.num_seqs, splits) if keep_final else []
    initial_z, initial_S = initial or (None, None)
    final_z, final_S = final or (None, None)
    launch(
        chunk_state_kernel,
        (slices * splits * call.Hkv * call.num_seqs,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        x_ptr=x,
        y_ptr=y,
        o_ptr=out,
        l_ptr=l,
        initial_S_ptr=initial_S,
        initial_z_ptr=initial_z,
        S_ptr=S,
        z_ptr=z,
        final_S_ptr=final_S,
        final_z_ptr=final_z,
        stride_x=strides_bht(x),
        stride_y=strides_bht(y),
        stride_o=strides_bht(out),
        REVERSE=grads is not None,
        BLOCK_D=features,
        BLOCK_DV=block_size(call.M),
        CHUNK=chunk,
        SPLITS=splits,
        HAS_INITIAL=bool(initial),
        HAS_FINAL=keep_final,
        **call.shared,
        **call.products,
    )
    return ChunkStates(S, z, [x[:, 0] if splits == 1 else x.sum(1) for x in final], splits)


def run_chunk_output(call: FeatureMapCall, out: Tensor, l: Tensor, states: ChunkStates) -> None:
    """Fill out and l from the states and the scores inside each chunk."""
    config = call.config.output
    num_tiles, tiles_per_number = call.num_tiles(config.BLOCK_T, from_keys=False)
    columns = min(config.BLOCK_DV, block_size(call.M))
    launch(
        chunk_output_kernel,
        (triton.cdiv(call.M, columns) * num_tiles * call.q.shape[1] * call.q.shape[0],),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        o_ptr=out,
        l_ptr=l,
        S_ptr=states.S,
        z_ptr=states.z,
        stride_q=strides_bht(call.q),
        stride_k=strides_bht(call.k),
        stride_v=strides_bht(call.v),
        stride_o=strides_bht(out),
        num_tiles=num_tiles,
        NUM_SEQS=call.num_seqs,
        TILES_PER_NUMBER=tiles_per_number,
        BLOCK_D=block_size(call.D),
        BLOCK_DV=columns,
        CHUNK=config.BLOCK_T,
        BLOCK_N=config.BLOCK_N,
        SPLITS=states.splits,
        **call.shared,
        **call.products,
    )


def run_chunk_backward(
    call: FeatureMapCall,
    grads: GradOutputs,
    states: ChunkStates,
    dstates: ChunkStates,
    dqkv: tuple[Tensor, ...],
    needs_grad: list[bool],
) -> None:
    """Fill those of dq, dk and dv that are needed."""
    config, (dq, dk, dv) = call.config.backward, dqkv
    num_tiles, tiles_per_number = call.num_tiles(config.BLOCK_T, from_keys=True)
    columns = min(config.BLOCK_D, max(block_size(call.D), block_size(call.M)))
    slices = triton.cdiv(max(call.D, call.M), columns)
    launch(
        chunk_backward_kernel,
        (slices * num_tiles * call.Hkv * call.k.shape[0],),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        o_ptr=grads.out,
        dout_ptr=grads.dout,
        l_ptr=grads.l,
        S_ptr=states.S,
        z_ptr=states.z,
        dS_ptr=dstates.S,
        dz_ptr=dstates.z,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        stride_q=strides_bht(call.q),
        stride_k=strides_bht(call.k),
        stride_v=strides_bht(call.v),
        stride_o=strides_bht(grads.out),
        stride_do=strides_bht(grads.dout),
        stride_dq=strides_bht(dq),
        stride_dk=strides_bht(dk),
        stride_dv=strides_bht(dv),
        num_tiles=num_tiles,
        NUM_SEQS=call.num_seqs,
        TILES_PER_NUMBER=tiles_per_number,
        BLOCK_C=columns,
        CHUNK=config.BLOCK_T,
        KEY_SPLITS=states.splits,
        QUERY_SPLITS=dstates.splits,
        NEEDS_DQ=needs_grad[0],
        NEEDS_DK=needs_grad[1],
        NEEDS_DV=needs_grad[2],
        **call.shared,
        **call.products,
    )
