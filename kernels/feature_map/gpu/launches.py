"""One launch a function, and what passes between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from linattn.kernels.common.gpu.launch import block_size, launch, strides
from linattn.kernels.common.gpu.numerics import TRITON_DTYPE
from linattn.kernels.common.op.allocation import empty_in_storage_order
from linattn.kernels.feature_map.gpu.config import splits_for
from linattn.kernels.feature_map.gpu.gradient import chunk_gradients
from linattn.kernels.feature_map.gpu.maps import map_rows
from linattn.kernels.feature_map.gpu.output import read_sums
from linattn.kernels.feature_map.gpu.recurrent import walk
from linattn.kernels.feature_map.gpu.sums import scan_sums

if TYPE_CHECKING:
    from linattn.kernels.feature_map.gpu.call import Call, State

ROWS_MAPPED = 32
"""By one program."""
STATE_ENTRIES = 8192
"""Of a state that is walked with, in one program's registers."""


class Rows(NamedTuple):
    """What a backward pass knows of the rows."""

    dout: Tensor
    out: Tensor
    l: Tensor


class Sums(NamedTuple):
    """What a scan made: rounded sums and fp32 totals at every chunk and split, and [f_sum, fv] after the last step."""

    totals: Tensor | None
    sums: Tensor | None
    last: State
    splits: int

    @staticmethod
    def none() -> Sums:
        return Sums(None, None, [], 1)


def mapped(q: Tensor, k: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Phi of q and of k."""
    fq, fk = (empty_in_storage_order(x, x.shape[3]) for x in (q, k))
    q_programs, k_programs = (x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], ROWS_MAPPED) for x in (q, k))
    launch(
        map_rows,
        (q_programs + k_programs,),
        num_warps=4,
        num_stages=1,
        **strides("q", q),
        **strides("k", k),
        **strides("fq", fq),
        **strides("fk", fk),
        H=q.shape[1],
        Hkv=k.shape[1],
        Tq=q.shape[2],
        Tk=k.shape[2],
        q_programs=q_programs,
        D=q.shape[3],
        BLOCK_T=ROWS_MAPPED,
        BLOCK_D=block_size(q.shape[3]),
        MAP=name,
        LOW=TRITON_DTYPE[q.dtype],
    )
    return fq, fk


def walked(call: Call, out: Tensor, l: Tensor, before: State, return_state: bool) -> State:
    """Fill out and l token by token; f_sum and fv afterwards, if they are returned."""
    columns = min(block_size(call.M), max(16, STATE_ENTRIES // block_size(call.D)))
    after = call.empty_state(call.sequences) if return_state else []
    launch(
        walk,
        (triton.cdiv(call.M, columns) * call.Hkv * call.sequences,),
        num_warps=4,
        num_stages=1,
        **strides("q", call.q),
        **strides("k", call.k),
        **strides("v", call.v),
        **strides("out", out, "o"),
        l_ptr=l,
        **_state("first", before),
        **_state("last", after),
        BLOCK_D=block_size(call.D),
        BLOCK_M=columns,
        HAS_FIRST=bool(before),
        HAS_LAST=return_state,
        **call.common,
    )
    return after


def scan(call: Call, chunk: int, first: State, keep_last: bool, rows: Rows | None = None) -> Sums:
    """Sums over keys or, given `rows`, the gradients to them."""
    config, Hkv, S = call.config, call.Hkv, call.sequences
    features = min(config.features, block_size(call.D))
    slices = triton.cdiv(call.D, features)
    length = (call.k if rows is None else call.q).shape[2]
    mean = length * call.k.shape[0] // S
    splits = splits_for(config, S * Hkv * slices, triton.cdiv(mean, chunk))
    stored = call.stored_sums(chunk, splits)
    sums = call.k.new_empty(stored, Hkv, call.D, call.M, dtype=call.product_dtype)
    totals = call.k.new_empty(stored, Hkv, call.D, dtype=torch.float32)
    last = call.empty_state(S, splits) if keep_last else []
    x, w = (call.k, call.v) if rows is None else (call.q, rows.dout)
    out, l = (w, None) if rows is None else (rows.out, rows.l)
    launch(
        scan_sums,
        (slices * splits * Hkv * S,),
        num_warps=config.state_warps,
        num_stages=config.stages if rows is None else config.row_stages,
        **strides("x", x),
        **strides("w", w),
        **strides("out", out, "o"),
        l_ptr=l,
        totals_ptr=totals,
        sums_ptr=sums,
        **_state("first", first),
        **_state("last", last),
        OF_ROWS=rows is not None,
        BLOCK_D=features,
        BLOCK_M=block_size(call.M),
        CHUNK=chunk,
        SPLITS=splits,
        HAS_FIRST=bool(first),
        HAS_LAST=keep_last,
        **call.common,
        **call.products,
    )
    return Sums(totals, sums, [x[:, 0] if splits == 1 else x.sum(1) for x in last], splits)


def read(call: Call, out: Tensor, l: Tensor, keys: Sums) -> None:
    """Fill out and l from the sums over keys and the scores inside each chunk."""
    config = call.config
    places, W = call.places(config.chunk, from_keys=False)
    columns = min(config.columns, block_size(call.M))
    launch(
        read_sums,
        (triton.cdiv(call.M, columns) * places * call.q.shape[1] * call.q.shape[0],),
        num_warps=config.output_warps,
        num_stages=1,
        **strides("q", call.q),
        **strides("k", call.k),
        **strides("v", call.v),
        **strides("out", out, "o"),
        l_ptr=l,
        totals_ptr=keys.totals,
        sums_ptr=keys.sums,
        places=places,
        sequences=call.sequences,
        W=W,
        BLOCK_D=block_size(call.D),
        BLOCK_M=columns,
        CHUNK=config.chunk,
        BLOCK_N=min(config.keys, config.chunk),
        SPLITS=keys.splits,
        **call.common,
        **call.products,
    )


def gradients_of_chunks(
    call: Call, rows: Rows, keys: Sums, dsums: Sums, gradients: tuple[Tensor, ...], wanted: list[bool]
) -> None:
    """Fill those of dq, dk and dv that are wanted."""
    config, (dq, dk, dv) = call.config, gradients
    places, W = call.places(config.backward_chunk, from_keys=True)
    columns = min(config.gradient, max(block_size(call.D), block_size(call.M)))
    slices = triton.cdiv(max(call.D, call.M), columns)
    launch(
        chunk_gradients,
        (slices * places * call.Hkv * call.k.shape[0],),
        num_warps=config.gradient_warps,
        num_stages=1,
        **strides("q", call.q),
        **strides("k", call.k),
        **strides("v", call.v),
        **strides("out", rows.out, "o"),
        **strides("dout", rows.dout, "do"),
        **strides("dq", dq),
        **strides("dk", dk),
        **strides("dv", dv),
        l_ptr=rows.l,
        totals_ptr=keys.totals,
        sums_ptr=keys.sums,
        dtotals_ptr=dsums.totals,
        dsums_ptr=dsums.sums,
        places=places,
        sequences=call.sequences,
        W=W,
        BLOCK=columns,
        CHUNK=config.backward_chunk,
        KEY_SPLITS=keys.splits,
        ROW_SPLITS=dsums.splits,
        DQ=wanted[0],
        DK=wanted[1],
        DV=wanted[2],
        **call.common,
        **call.products,
    )


def _state(name: str, sums: State) -> dict[str, Tensor | None]:
    total, matrix = sums or (None, None)
    return {f"{name}_total_ptr": total, f"{name}_ptr": matrix}
