"""The chunked form: keys are folded into sums, chunk by chunk; rows read the sums and the scores of their own chunk.

Forward: STATE, the sums at all boundaries of chunks (sums.py), then QUERY (rows.py).
Backward: what rows hand on, STATE of the keys again, GRAD for dq; then STATE of the rows in reverse, GRAD for dk and
QUERY for dv (keys.py). Nothing but out and l is saved.

The direct form beside a state runs on the same kernels: one chunk, in which all scores are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.architecture import architecture
from linattn.kernels.common.gpu.launch import strides, with_unit_stride
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE, precision
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs, Plan
from linattn.kernels.common.op.varlen import check_sequences
from linattn.kernels.quadratic.contract import Options
from linattn.kernels.quadratic.gpu import config, layout, sums
from linattn.kernels.quadratic.gpu.call import FOLD, Call, run_kernel
from linattn.kernels.quadratic.gpu.keys import pull_folded_keys, pull_lost_rows
from linattn.kernels.quadratic.gpu.memory import Part, joined, keeps_sums, parts
from linattn.kernels.quadratic.gpu.rows import pull_rows, read_rows, share_rows

if TYPE_CHECKING:
    from linattn.kernels.quadratic.gpu.layout import State

SHARE = config.Fold(32, 4, 2)


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute the op's results."""
    q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, save, plan = inputs
    cu_seqlens = _checked(cu_seqlens, q.shape[2])
    call = Call.of(q, k, v, key_mask, cu_seqlens, initial_state, options, plan)
    out, l = empty_in_storage_order(call.q, v.shape[3]), empty_row_sums(call.q)
    lost = torch.empty_like(l, dtype=torch.uint8) if call.guarded else None
    kept: State = []

    def read(part: Part) -> State:
        some, before = part.its_call(), part.of_all(initial_state)
        of_keys = sums.of_keys(some, before, keep=return_state)
        rows = {"l_ptr": part.of(l), "lost_ptr": part.of(lost), "limit": config.CANCELLATION[q.dtype]}
        _over_rows(read_rows, some, call.row.read, of_keys, rows | strides("out", part.of(out), "o"))
        if save and keeps_sums(call):
            kept.extend((of_keys.pairs, of_keys.record))
        return sums.state_after(some, of_keys, before) if return_state else []

    state = joined((part, read(part)) for part in parts(call))
    return out, l, state, [lost, *kept] if save and lost is not None else kept


def saved_like(inputs: ForwardInputs) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `forward` saves: which rows are lost to the sums, and sums if they are kept."""
    q, k, v, _, cu_seqlens, initial_state, options, _, _, plan = inputs
    call = Call.of(q, k, v, None, cu_seqlens, initial_state, options, plan)
    found = [(tuple(q.shape[:3]), torch.uint8)] if call.guarded else []
    if keeps_sums(call):
        features, size = layout.features(call.BLOCK_D), layout.record_size(call.BLOCK_D, call.BLOCK_M)
        found.append(((call.slots, call.Hkv, features, call.BLOCK_M), FOLD[q.dtype]))
        found.append(((call.slots, call.Hkv, size), torch.float32))
    return found


def backward(inputs: BackwardInputs) -> Gradients:
    """Compute the op's gradients."""
    (dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state, options, needs_grad, plan) = inputs
    cu_seqlens = _checked(cu_seqlens, q.shape[2])
    call = Call.of(q, k, v, key_mask, cu_seqlens, initial_state, options, plan)
    dout = with_unit_stride(dout)
    lost, kept = (saved[0], saved[1:]) if call.guarded else (None, saved)
    rows = _share(call, dout, out, l, lost)
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    want_initial = needs_grad[3] and bool(initial_state)

    def pull_queries(part: Part) -> None:
        some = part.its_call()
        of_keys = (
            sums.Sums(kept[0], kept[1], None) if kept else sums.of_keys(some, part.of_all(initial_state), keep=False)
        )
        mine = rows.of(part) | strides("dout", part.of(dout), "g") | strides("dq", part.of(dq))
        _over_rows(pull_rows, some, call.row.pull_rows, of_keys, mine)

    def pull_keys(part: Part) -> State:
        some, mine = part.its_call(), rows.of(part) | strides("dout", part.of(dout), "g")
        delta, after = mine["folded_delta_ptr"] if options.normalize else None, part.of_all(dstate)
        of_rows = sums.of_rows(some, mine["shared_ptr"], delta, after, keep=want_initial)
        if needs_grad[1]:
            _pull_keys(some, of_rows, mine, part.of(dk), of_values=False)
        if needs_grad[2]:
            _pull_keys(some, of_rows, mine, part.of(dv), of_values=True)
        if call.guarded and (needs_grad[1] or needs_grad[2]):
            _pull_lost_rows(some, mine, part.of(dk), part.of(dv), needs_grad)
        return sums.state_gradients(some, of_rows, after) if want_initial else []

    def pull(part: Part) -> State:
        if needs_grad[0]:
            pull_queries(part)  # its sums are gone before the others are made
        return pull_keys(part) if needs_grad[1] or needs_grad[2] or want_initial else []

    return dq, dk, dv, joined((part, pull(part)) for part in parts(call))


def state_after(inputs: ForwardInputs) -> State:
    """The state of a call that began without one."""
    q, k, v, key_mask, cu_seqlens, _, options, *_ = inputs
    call = Call.of(q, k, v, key_mask, cu_seqlens, [], options._replace(is_causal=False), Plan("direct", "triton"))
    return sums.state_after(call, sums.of_keys(call, [], keep=True), [])


def _checked(cu_seqlens: Tensor | None, rows: int) -> Tensor | None:
    """`cu_seqlens` as kernels read it, once it is known to partition the rows."""
    if cu_seqlens is None:
        return None
    check_sequences(cu_seqlens, rows)
    return cu_seqlens.contiguous()


def _over_rows(kernel: Any, call: Call, read: config.Read, of_keys: sums.Sums, arguments: dict[str, Any]) -> None:
    """Run a kernel over tiles of queries; tiles begin at multiples of their size of positions."""
    first = call.options.q_offset // read.rows * read.rows
    tiles = triton.cdiv(call.q.shape[2] + call.options.q_offset - first, read.rows)
    c0, c1, c2 = call.weights
    arguments = call.scores(read) | arguments | {
        "sums_ptr": of_keys.pairs, "record_ptr": of_keys.record, "H": call.q.shape[1], "first_position": first, "tiles": tiles,
        "BLOCK_Q": read.rows, "BLOCK_K": read.others, "weight_0": c0, "weight_1": c1, "weight_2": c2,
    }  # fmt: skip
    run_kernel(kernel, (call.pieces(tiles, read.rows), call.q.shape[1]), read, arguments)


class Shared(NamedTuple):
    """What rows hand on (rows.share_rows)."""

    shared_ptr: Tensor
    norm_ptr: Tensor
    delta_ptr: Tensor
    folded_delta_ptr: Tensor
    lost_ptr: Tensor | None
    lost_norm_ptr: Tensor | None
    lost_tiles_ptr: Tensor | None

    def of(self, part: Part) -> dict[str, Any]:
        return {name: part.of(x) for name, x in self._asdict().items()}


def _share(call: Call, dout: Tensor, out: Tensor, l: Tensor, lost: Tensor | None) -> Shared:
    B, H, T, M = out.shape
    normalize, tiles = call.options.normalize, triton.cdiv(T, SHARE.BLOCK_T)
    norm, delta, folded_delta = (torch.empty_like(l) if normalize else l.new_empty(0) for _ in range(3))
    shared = Shared(
        out.new_empty(out.shape, dtype=FOLD[out.dtype]), norm, delta, folded_delta, lost,
        None if lost is None else torch.empty_like(l), None if lost is None else lost.new_empty(B, H, tiles),
    )  # fmt: skip
    arguments = dict(
        **strides("out", out, "o"), **strides("dout", dout, "g"), **shared._asdict(), l_ptr=l, T=T, H=H, M=M,
        BLOCK_Q=SHARE.BLOCK_T, BLOCK_M=call.BLOCK_M, NORMALIZE=normalize, GUARD=call.guarded,
        FOLD=TRITON_DTYPE[FOLD[out.dtype]],
    )  # fmt: skip
    run_kernel(share_rows, (tiles, H, B), SHARE, arguments)
    return shared


def _pull_keys(call: Call, of_rows: sums.Sums, rows: dict[str, Any], gradient: Tensor, of_values: bool) -> None:
    """Fill dv or dk."""
    read = call.row.pull_values if of_values else call.row.pull_keys
    tiles = triton.cdiv(call.k.shape[2], read.rows)
    arguments = call.scores(read) | rows | dict(
        sums_ptr=of_rows.pairs, record_ptr=of_rows.record, H=call.Hkv, tiles=tiles, BLOCK_Q=read.others,
        BLOCK_K=read.rows, OF_VALUES=of_values, **strides("gradient", gradient, "d"),
    )  # fmt: skip
    run_kernel(pull_folded_keys, (call.pieces(tiles, read.rows), call.Hkv), read, arguments)


def _pull_lost_rows(call: Call, rows: dict[str, Any], dk: Tensor, dv: Tensor, needs_grad: list[bool]) -> None:
    """Rows in steps of a tile of `_share`, which says where some are."""
    tile = call.row.lost
    tiles = triton.cdiv(call.k.shape[2], tile.BLOCK_T)
    arguments = call.constants() | call.pairs() | rows | dict(
        H=call.Hkv, tiles=tiles, lost_tiles=triton.cdiv(call.q.shape[2], SHARE.BLOCK_T), BLOCK_Q=SHARE.BLOCK_T,
        BLOCK_K=tile.BLOCK_T, WANT_DK=needs_grad[1], WANT_DV=needs_grad[2], **strides("dk", dk), **strides("dv", dv),
        PRECISION=precision(call.q.dtype),
    )  # fmt: skip
    run_kernel(pull_lost_rows, (call.pieces(tiles, tile.BLOCK_T), call.Hkv), tile, arguments)


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> str:
    """What runs: sizes, launches, and what becomes of the sums in training."""
    call = Call.of(q, k, v, None, None, [], Options(is_causal, 0, 1.0, 1.0, 2.0, 1.0, True), Plan("chunked", "triton"))
    read, groups, kept = call.row.read, len(list(parts(call))), keeps_sums(call)
    tile = f"{read.rows} rows x {read.WIDTH * 16} features, {read.num_warps} warps"
    sums_of = f"chunks of {call.chunk}" if is_causal else "all keys"
    in_groups = f" in {groups} groups of heads" if groups > 1 else ""
    launches = f"{4 * groups} launches forward, {1 + groups * (7 if kept else 10)} backward"
    for_backward = "kept" if kept else "made again"
    return (
        f"Triton, {architecture(q.device)}: sums over {sums_of}{in_groups}, read by tiles of {tile}; {launches} "
        f"(sums {for_backward})"
    )
