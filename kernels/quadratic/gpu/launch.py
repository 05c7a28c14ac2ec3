"""Which kernels a call of the chunked form runs on, forward and backward.

Keys are summed into a state, chunk by chunk; queries multiply with the state before their chunk and compute the scores
inside it. Forward: the state over keys at all boundaries (chunk_state.py), then out (chunk_output.py). Backward: dO / l
(bwd_preprocess.py), the state over keys again unless it was kept (workspace.py), dq (chunk_dq.py); then the state over
queries in reverse, dk and dv (chunk_dkv.py, cancelled_dkv.py). Beyond out and l, forward saves which queries are
cancelled, and by the rule of workspace.py the state.

The direct form beside a state runs on the same kernels: one chunk, in which all scores are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import with_unit_stride
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs, Plan
from linattn.kernels.quadratic.contract import Options
from linattn.kernels.quadratic.gpu.bwd_preprocess import bwd_preprocess
from linattn.kernels.quadratic.gpu.cancelled_dkv import launch_cancelled_dkv
from linattn.kernels.quadratic.gpu.chunk_dkv import launch_dkv
from linattn.kernels.quadratic.gpu.chunk_dq import launch_dq
from linattn.kernels.quadratic.gpu.chunk_output import launch_output
from linattn.kernels.quadratic.gpu.chunk_state import (
    ChunkState,
    state_over_keys,
    state_over_queries,
)
from linattn.kernels.quadratic.gpu.kernel_args import STATE_DTYPE, ChunkedProblem
from linattn.kernels.quadratic.gpu.state_layout import gradients_to_initial_state, state_after_call
from linattn.kernels.quadratic.gpu.workspace import HeadGroup, concat_states, head_groups, keeps_states

if TYPE_CHECKING:
    from linattn.kernels.quadratic.gpu.state_layout import State


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute out, l, the state after the call and what the backward pass is to have."""
    problem = ChunkedProblem.of(inputs)
    problem.check()
    out, l = empty_in_storage_order(problem.q, problem.v.shape[3]), empty_row_sums(problem.q)
    cancelled = torch.empty_like(l, dtype=torch.uint8) if problem.check_cancellation else None
    kept: State = []

    def run(group: HeadGroup) -> State:
        part, before = group.problem(), group.of_all(inputs.initial_state)
        state = state_over_keys(part, before, keep_final=inputs.return_state)
        launch_output(part, state, group.of(out), group.of(l), group.of(cancelled))
        if inputs.save and keeps_states(problem):
            kept.extend((state.products, state.moments))
        return state_after_call(part, state.final, before) if inputs.return_state else []

    after = concat_states((group, run(group)) for group in head_groups(problem))
    return out, l, after, [cancelled, *kept] if inputs.save and cancelled is not None else kept


def saved_like(inputs: ForwardInputs) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of what `forward` saves: which queries are cancelled, and the state if it is kept."""
    problem = ChunkedProblem.of(inputs)
    saved = [(tuple(problem.q.shape[:3]), torch.uint8)] if problem.check_cancellation else []
    if keeps_states(problem):
        heads = (problem.slots, problem.kv_heads)
        saved.append(((*heads, problem.feature_count, problem.block_dv), STATE_DTYPE[problem.q.dtype]))
        saved.append(((*heads, problem.moments_size), torch.float32))
    return saved


def backward(inputs: BackwardInputs) -> Gradients:
    """Compute dq, dk, dv and the gradients to the state before the call."""
    problem = ChunkedProblem.of(inputs)
    problem.check()
    cancelled, kept = (inputs.saved[0], inputs.saved[1:]) if problem.check_cancellation else (None, inputs.saved)
    grads = bwd_preprocess(problem, with_unit_stride(inputs.dout), inputs.out, inputs.l, cancelled)
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (inputs.q, inputs.k, inputs.v))
    needs_dq, needs_dk, needs_dv, needs_dstate = inputs.needs_grad
    needs_initial = needs_dstate and bool(inputs.initial_state)

    def run_queries(group: HeadGroup) -> None:
        part = group.problem()
        if kept:
            state = ChunkState(kept[0], kept[1], None)
        else:
            state = state_over_keys(part, group.of_all(inputs.initial_state), keep_final=False)
        launch_dq(part, state, grads.of(group), group.of(dq))

    def run_keys(group: HeadGroup) -> State:
        part, own, after = group.problem(), grads.of(group), group.of_all(inputs.dstate)
        delta = own.delta_scaled if inputs.options.normalize else None
        state = state_over_queries(part, own.dout_scaled, delta, after, keep_final=needs_initial)
        if needs_dk:
            launch_dkv(part, state, own, group.of(dk), of_values=False)
        if needs_dv:
            launch_dkv(part, state, own, group.of(dv), of_values=True)
        if problem.check_cancellation and (needs_dk or needs_dv):
            launch_cancelled_dkv(part, own, group.of(dk), group.of(dv), needs_dk, needs_dv)
        return gradients_to_initial_state(part, state.final, after) if needs_initial else []

    def run(group: HeadGroup) -> State:
        if needs_dq:
            run_queries(group)  # its state is freed before the other one is made
        return run_keys(group) if needs_dk or needs_dv or needs_initial else []

    return dq, dk, dv, concat_states((group, run(group)) for group in head_groups(problem))


def state_after(inputs: ForwardInputs) -> State:
    """Return the state of a call that began without one."""
    options, plan = inputs.options._replace(is_causal=False), Plan("direct", "triton")
    problem = ChunkedProblem.of(inputs._replace(options=options, plan=plan))
    return state_after_call(problem, state_over_keys(problem, [], keep_final=True).final, [])


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str:
    """Say what runs: sizes, launches, and what becomes of the states in training."""
    options, plan = Options(is_causal, 0, 1.0, 1.0, 2.0, 1.0, True), Plan("chunked", "triton")
    problem = ChunkedProblem.of(ForwardInputs(q, k, v, None, None, [], options, False, False, plan))
    tile, groups, kept = problem.tiles.output, len(list(head_groups(problem))), keeps_states(problem)
    tiles_of = f"{tile.BLOCK_T} queries x {tile.WIDTH * 16} features, {tile.num_warps} warps"
    sums_over = f"chunks of {problem.chunk}" if is_causal else "all keys"
    in_groups = f" in {groups} groups of heads" if groups > 1 else ""
    launches = f"{4 * groups} launches forward, {1 + groups * (7 if kept else 10)} backward"
    for_backward = "kept" if kept else "made again"
    return (
        f"Triton, {architecture(q.device)}: sums over {sums_over}{in_groups}, in tiles of {tiles_of}; {launches} "
        f"(sums {for_backward})"
    )
