"""STATE: sums at the boundaries of chunks (kernels: state.py), from canonical states and back to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common.gpu.launch import strides
from ...common.gpu.numerics import LOW
from . import config, layout
from .call import FOLD, Call, run_kernel
from .layout import State
from .state import pair_sums, record_sums, scan_sums

SCAN = config.Fold(1024, 4, 2)


class Sums(NamedTuple):
    """Sums at boundaries `[slots, Hkv, ...]`; and, if asked for, what they come to after all keys (in reverse: before
    all rows) `[sequences, Hkv, ...]`."""

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
    S, H, T, causal = call.sequences, call.Hkv, x.shape[2], call.options.is_causal
    features, size = layout.features(call.BLOCK_D), layout.record_size(call.BLOCK_D, call.BLOCK_M)
    pairs = x.new_empty(call.slots, H, features, call.BLOCK_M, dtype=FOLD[x.dtype])
    record = x.new_empty(call.slots, H, size, dtype=torch.float32)
    ends = (record.new_empty(S, H, *pairs.shape[2:]), record.new_empty(S, H, size)) if keep else None
    offsets, kept = offset or (None, None), ends or (None, None)
    c0, c1, c2 = call.weights
    mask = None if reverse else call.key_mask
    shared: dict[str, Any] = call.constants() | dict(
        **strides("x", x), **strides("y", y), key_mask_ptr=mask, MASKED=mask is not None,
        stride_mb=0 if mask is None else mask.stride(0), T=T, Tk=call.k.shape[2], H=H, REVERSE=reverse,
        GROUP=call.group if reverse else 1, LOW=LOW[FOLD[x.dtype]],
    )  # fmt: skip

    run = _run(call, T)
    # Forward nothing comes to boundary 0: there is one chunk less than there are boundaries.
    per_sequence = triton.cdiv((call.boundaries - (not reverse)) * call.chunk if causal else T, run)
    runs = call.pieces(per_sequence, run)
    scanned = keep or offset is not None or not causal or runs > S
    totals = record.new_empty(runs if scanned else 0, H, *pairs.shape[2:])
    tile = call.row.pairs
    regular = mask is None and call.cu_seqlens is None and call.tables is None
    whole = regular and T % tile.BLOCK_T == 0 and (call.options.q_offset if reverse else 0) % tile.BLOCK_T == 0
    arguments = shared | dict(
        sums_ptr=pairs, totals_ptr=totals, RUN=run, runs=per_sequence, weight=2 * c2, TOTALS=scanned,
        BLOCK_T=tile.BLOCK_T, EVEN_T=whole,
    )  # fmt: skip
    run_kernel(pair_sums, (features // 256, runs, H), tile, arguments)
    if scanned:
        _scan(call, arguments | dict(weight=1.0 if reverse else 2 * c2), offsets[0], kept[0], in_place=False)

    # A record is small: one program makes that of a whole chunk, and each chunk is then its own run.
    if causal:
        run, per_sequence = call.chunk, call.boundaries
    runs = call.pieces(per_sequence, run)
    parts = record if causal else record.new_empty(runs, H, size)
    weights = (c0, c1, c2) if reverse else (1.0, 1.0, 1.0)
    tile = call.row.record
    arguments = shared | dict(
        sums_ptr=parts, RUN=run, runs=per_sequence, f_ptr=f, FACTOR=f is not None, BLOCK_T=tile.BLOCK_T,
        stride_fb=0 if f is None else f.stride(0), stride_fh=0 if f is None else f.stride(1),
        weight_0=weights[0], weight_1=weights[1], weight_2=weights[2],
    )  # fmt: skip
    run_kernel(record_sums, (runs, H), tile, arguments)
    arguments |= dict(sums_ptr=record, totals_ptr=parts, weight=1.0)
    _scan(call, arguments, offsets[1], kept[1], in_place=causal)
    return Sums(pairs, record, ends)


def _run(call: Call, T: int) -> int:
    """Rows of a run: as many as leave enough programs to fill the chip; whole chunks if causal."""
    length, step = (call.k.shape[2], call.chunk) if call.options.is_causal else (T, 8 * call.row.pairs.BLOCK_T)
    blocks = layout.features(call.BLOCK_D) // 256 * call.Hkv * call.sequences
    wanted = triton.cdiv(call.row.programs, blocks)
    return max(length // (step * wanted), 1) * step


def _scan(call: Call, arguments: dict[str, Any], offset: Tensor | None, end: Tensor | None, in_place: bool) -> None:
    sums = arguments["sums_ptr"]
    size = sums.shape[2:].numel()
    arguments |= dict(
        offset_ptr=offset, OFFSET=offset is not None, end_ptr=end, END=end is not None, size=size, BLOCK=SCAN.BLOCK_T,
        IN_PLACE=in_place, LOW=LOW[sums.dtype],
    )  # fmt: skip
    run_kernel(scan_sums, (triton.cdiv(size, SCAN.BLOCK_T), call.sequences, call.Hkv), SCAN, arguments)


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
