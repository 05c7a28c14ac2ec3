"""The chunked form: keys are folded into sums, chunk by chunk; rows read the sums and the scores of their own chunk.

Forward: STATE, the sums at all boundaries of chunks (sums.py), then QUERY (rows.py).
Backward: what rows hand on, STATE of the keys again, GRAD for dq; then STATE of the rows in reverse, GRAD for dk and
QUERY for dv (keys.py). Nothing but out and l is saved.

The direct form beside a state runs on the same kernels: one chunk, in which all scores are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common.allocation import empty_in_storage_order, empty_row_sums
from ...common.gpu.architecture import architecture
from ...common.gpu.launch import block, readable, strides
from ...common.gpu.numerics import LOW
from ...common.stateful import Plan
from ..contract import Options
from . import config, sums
from .call import FOLD, Call, run_kernel
from .keys import pull_folded_keys
from .layout import State
from .rows import pull_rows, read_rows, share_rows

SHARE = config.Fold(32, 4, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    return_state: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, State, State]:
    call = Call.of(q, k, v, key_mask, cu_seqlens, initial_state, options, plan)
    of_keys = sums.of_keys(call, initial_state, keep=return_state)
    out, l = empty_in_storage_order(call.q, v.shape[3]), empty_row_sums(call.q)
    grid, arguments = _rows(call, call.row.read)
    arguments |= dict(sums_ptr=of_keys.pairs, record_ptr=of_keys.record, l_ptr=l) | strides("out", out, "o")
    run_kernel(read_rows, grid, call.row.read, arguments)
    return out, l, sums.state_after(call, of_keys, initial_state) if return_state else [], []


def backward(
    dout: Tensor,
    dstate: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    l: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    wanted: list[bool],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, State]:
    call = Call.of(q, k, v, key_mask, cu_seqlens, initial_state, options, plan)
    dout = readable(dout)
    rows = _share(call, dout, out, l)
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    if wanted[0]:
        of_keys = sums.of_keys(call, initial_state, keep=False)
        grid, arguments = _rows(call, call.row.pull_rows)
        arguments |= dict(sums_ptr=of_keys.pairs, record_ptr=of_keys.record) | strides("dout", dout, "g")
        run_kernel(pull_rows, grid, call.row.pull_rows, arguments | rows._asdict() | strides("dq", dq))
        del of_keys, arguments  # before the other sums are made
    want_initial = wanted[3] and bool(initial_state)
    dinitial: State = []
    if wanted[1] or wanted[2] or want_initial:
        delta = rows.folded_delta_ptr if options.normalize else None
        of_rows = sums.of_rows(call, rows.shared_ptr, delta, dstate, keep=want_initial)
        if wanted[1]:
            _pull_keys(call, of_rows, dout, rows, dk, of_values=False)
        if wanted[2]:
            _pull_keys(call, of_rows, dout, rows, dv, of_values=True)
        if want_initial:
            dinitial = sums.state_gradients(call, of_rows, dstate)
    return dq, dk, dv, dinitial


def state_after(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> State:
    """The state of a call that began without one."""
    call = Call.of(q, k, v, key_mask, cu_seqlens, [], options._replace(is_causal=False), Plan("direct", "triton"))
    return sums.state_after(call, sums.of_keys(call, [], keep=True), [])


def _rows(call: Call, read: config.Read) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of a kernel over tiles of queries; tiles begin at multiples of their size of positions."""
    first = call.options.q_offset // read.rows * read.rows
    tiles = triton.cdiv(call.q.shape[2] + call.options.q_offset - first, read.rows)
    c0, c1, c2 = call.weights
    arguments = dict(
        H=call.q.shape[1], first_position=first, tiles=tiles, BLOCK_Q=read.rows, BLOCK_K=read.others,
        weight_0=c0, weight_1=c1, weight_2=c2,
    )  # fmt: skip
    return (call.pieces(tiles, read.rows), call.q.shape[1]), call.scores(read) | arguments


class Shared(NamedTuple):
    """What rows hand on (rows.share_rows)."""

    shared_ptr: Tensor
    norm_ptr: Tensor
    delta_ptr: Tensor
    folded_delta_ptr: Tensor


def _share(call: Call, dout: Tensor, out: Tensor, l: Tensor) -> Shared:
    B, H, T, M = out.shape
    normalize = call.options.normalize
    row_terms = (torch.empty_like(l) if normalize else l.new_empty(0) for _ in range(3))
    shared = Shared(out.new_empty(out.shape, dtype=FOLD[out.dtype]), *row_terms)
    arguments = dict(
        **strides("out", out, "o"), **strides("dout", dout, "g"), **shared._asdict(), l_ptr=l, T=T, H=H, M=M,
        BLOCK_Q=SHARE.BLOCK_T, BLOCK_M=call.BLOCK_M, NORMALIZE=normalize, FOLD=LOW[FOLD[out.dtype]],
    )  # fmt: skip
    run_kernel(share_rows, (triton.cdiv(T, SHARE.BLOCK_T), H, B), SHARE, arguments)
    return shared


def _pull_keys(call: Call, of_rows: sums.Sums, dout: Tensor, rows: Shared, gradient: Tensor, of_values: bool) -> None:
    """Fill dv or dk."""
    read = call.row.pull_values if of_values else call.row.pull_keys
    tiles = triton.cdiv(call.k.shape[2], read.rows)
    arguments = call.scores(read) | dict(
        sums_ptr=of_rows.pairs, record_ptr=of_rows.record, norm_ptr=rows.norm_ptr, delta_ptr=rows.delta_ptr,
        H=call.Hkv, tiles=tiles, BLOCK_Q=read.others, BLOCK_K=read.rows, OF_VALUES=of_values,
        **strides("dout", dout, "g"), **strides("gradient", gradient, "d"),
    )  # fmt: skip
    run_kernel(pull_folded_keys, (call.pieces(tiles, read.rows), call.Hkv), read, arguments)


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str:
    name = architecture(q.device)
    row = config.row(name, q.dtype, max(block(q.shape[3]), block(v.shape[3])))
    tile = f"{row.read.rows} rows x {row.read.WIDTH * 16} features, {row.read.num_warps} warps"
    sums_of = f"chunks of {row.chunk}" if is_causal else "all keys"
    return f"Triton, {name}: sums over {sums_of}, read by tiles of {tile}"
