"""STATE: sums at the boundaries of chunks (kernels: state.py), from canonical states and back to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.launch import strides
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE
from linattn.kernels.quadratic.gpu import config, layout
from linattn.kernels.quadratic.gpu.call import FOLD, Call, run_kernel
from linattn.kernels.quadratic.gpu.state import pair_sums, record_sums, scan_sums

if TYPE_CHECKING:
    from linattn.kernels.quadratic.gpu.layout import State

SCAN = config.Fold(1024, 4, 2)


class Sums(NamedTuple):
    """Sums at boundaries `[slots, Hkv, ...]`; and, if asked for, what they come to after all keys (in reverse: before
    all rows) `[sequences, Hkv, ...]`.
    """

    pairs: Tensor
    record: Tensor
    ends: tuple[Tensor, Tensor] | None


def of_keys(call: Call, before: State, keep: bool) -> Sums:
    """Sums over keys at all boundaries, after those of the state `before`."""
    offset = None
    if before:
        blocks = layout.blocks_of(before[5], call.q.shape[3], call.BLOCK_D, call.BLOCK_M)
        offset = (blocks, layout.record_of(before[1:], before[0], call.BLOCK_D, call.BLOCK_M))
    return _sums(call, call.k, call.v, None, offset, keep, reverse=False)


def of_rows(call: Call, shared: Tensor, delta: Tensor | None, dafter: State, keep: bool) -> Sums:
    """Gradients to these sums, gathered from later rows and from the gradients to the state after the call."""
    offset = None
    if dafter:
        blocks = layout.pulled_blocks_of(dafter[4], call.q.shape[3], call.BLOCK_D, call.BLOCK_M)
        offset = (blocks, layout.record_of(dafter, None, call.BLOCK_D, call.BLOCK_M))
    return _sums(call, call.q, shared, delta, offset, keep, reverse=True)


def _sums(
    call: Call,
    x: Tensor,
    y: Tensor,
    f: Tensor | None,
    offset: tuple[Tensor, Tensor] | None,
    keep: bool,
    reverse: bool,
) -> Sums:
    S, H = call.sequences, call.Hkv
    features, size = layout.features(call.BLOCK_D), layout.record_size(call.BLOCK_D, call.BLOCK_M)
    mask = None if reverse else call.key_mask
    arguments: dict[str, Any] = call.constants() | dict(
        **strides("x", x), **strides("y", y), key_mask_ptr=mask, MASKED=mask is not None,
        stride_mb=0 if mask is None else mask.stride(0), T=x.shape[2], Tk=call.k.shape[2], H=H, REVERSE=reverse,
        GROUP=call.group if reverse else 1, LOW=TRITON_DTYPE[FOLD[x.dtype]],
    )  # fmt: skip
    pairs, of_pairs = _pairs(call, arguments, offset is not None or keep)
    record, of_record = _record(call, arguments, f)
    ends = (record.new_empty(S, H, features, call.BLOCK_M), record.new_empty(S, H, size)) if keep else None
    offsets, kept = offset or (None, None), ends or (None, None)
    scanned = triton.cdiv(features * call.BLOCK_M, SCAN.BLOCK_T) if of_pairs["TOTALS"] else 0
    arguments |= of_record | of_pairs | {
        "weight": 1.0 if reverse else 2 * call.weights[2], "OF_PAIRS": scanned, "OFFSET": offset is not None, "END": keep,
        "offset_ptr": offsets[0], "record_offset_ptr": offsets[1], "end_ptr": kept[0], "record_end_ptr": kept[1], "size": size,
        "BLOCK": SCAN.BLOCK_T,
    }  # fmt: skip
    run_kernel(scan_sums, (scanned + triton.cdiv(size, SCAN.BLOCK_T), S, H), SCAN, arguments)
    return Sums(pairs, record, ends)


def _pairs(call: Call, shared: dict[str, Any], always_scanned: bool) -> tuple[Tensor, dict[str, Any]]:
    """Sums over pairs within runs, and how they were cut."""
    T, reverse, causal, tile = shared["T"], shared["REVERSE"], call.options.is_causal, call.row.pairs
    features = layout.features(call.BLOCK_D)
    pairs = call.q.new_empty(call.slots, call.Hkv, features, call.BLOCK_M, dtype=FOLD[call.q.dtype])
    run = _run(call, T)
    # Forward nothing comes to boundary 0: there is one chunk less than there are boundaries.
    per_sequence = triton.cdiv((call.boundaries - (not reverse)) * call.chunk if causal else T, run)
    runs = call.pieces(per_sequence, run)
    scanned = always_scanned or not causal or runs > call.sequences
    totals = pairs.new_empty(runs if scanned else 0, *pairs.shape[1:], dtype=torch.float32)
    regular = not shared["MASKED"] and call.cu_seqlens is None and call.tables is None
    whole = regular and T % tile.BLOCK_T == 0 and (call.options.q_offset if reverse else 0) % tile.BLOCK_T == 0
    cut = {"sums_ptr": pairs, "totals_ptr": totals, "RUN": run, "runs": per_sequence, "TOTALS": scanned}
    arguments = shared | cut | {"weight": 2 * call.weights[2], "BLOCK_T": tile.BLOCK_T, "EVEN_T": whole}
    run_kernel(pair_sums, (features // 256, runs, call.Hkv), tile, arguments)
    return pairs, cut


def _record(call: Call, shared: dict[str, Any], f: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """The record of every part, and how they were cut. It is small: one program makes that of a whole chunk."""
    size, tile, causal = layout.record_size(call.BLOCK_D, call.BLOCK_M), call.row.record, call.options.is_causal
    run = _run(call, shared["T"])
    part, per_sequence = (call.chunk, call.boundaries) if causal else (run, triton.cdiv(shared["T"], run))
    parts = call.pieces(per_sequence, part)
    record = call.q.new_empty(call.slots, call.Hkv, size, dtype=torch.float32)
    of_parts = record if causal else record.new_empty(parts, call.Hkv, size)
    weights = call.weights if shared["REVERSE"] else (1.0, 1.0, 1.0)
    arguments = shared | {
        "record_ptr": of_parts, "PART": part, "parts": per_sequence, "f_ptr": f, "FACTOR": f is not None, "BLOCK_T": tile.BLOCK_T,
        "stride_fb": 0 if f is None else f.stride(0), "stride_fh": 0 if f is None else f.stride(1),
        "weight_0": weights[0], "weight_1": weights[1], "weight_2": weights[2],
    }  # fmt: skip
    run_kernel(record_sums, (parts, call.Hkv), tile, arguments)
    return record, {"record_ptr": record, "parts_ptr": of_parts, "PART": part, "parts": per_sequence}


def _run(call: Call, T: int) -> int:
    """Rows of a run: as many as leave enough programs to fill the chip; whole chunks if causal."""
    length, step = (call.k.shape[2], call.chunk) if call.options.is_causal else (T, 8 * call.row.pairs.BLOCK_T)
    wanted = triton.cdiv(call.row.programs, layout.features(call.BLOCK_D) // 256 * call.heads)
    return max(length // (step * wanted), 1) * step


def state_after(call: Call, sums: Sums, before: State) -> State:
    """The canonical state after the call."""
    T = call.k.shape[2]
    if call.cu_seqlens is not None:
        seen = torch.arange(T + 1, device=call.k.device)
        if call.key_mask is not None:
            seen = torch.nn.functional.pad(call.key_mask[0].cumsum(0), (1, 0))
        n = seen[call.cu_seqlens.long()].diff()
    elif call.key_mask is not None:
        n = call.key_mask.sum(1)
    else:
        n = torch.full((call.sequences,), T, dtype=torch.int64, device=call.k.device)
    assert sums.ends is not None
    pairs, record = sums.ends
    D, M = call.q.shape[3], call.v.shape[3]
    sums_of_degree_1 = layout.sums_of(record, before[1:], D, M, call.BLOCK_D, call.BLOCK_M)
    return [n + before[0] if before else n, *sums_of_degree_1, layout.products_of(pairs, D, M)]


def state_gradients(call: Call, sums: Sums, dafter: State) -> State:
    """The gradients to the canonical state before the call; n has none."""
    assert sums.ends is not None
    pairs, record = sums.ends
    D, M = call.q.shape[3], call.v.shape[3]
    sums_of_degree_1 = layout.sums_of(record, dafter, D, M, call.BLOCK_D, call.BLOCK_M)
    return [*sums_of_degree_1, layout.pulled_products_of(pairs, D, M)]
