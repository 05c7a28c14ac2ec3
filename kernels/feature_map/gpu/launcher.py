"""Which kernels a call runs, and with what.

A chunk is a tile of rows here, so the table in `config` sets its size: `plan.chunk_size` is not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common.allocation import empty_in_storage_order, empty_row_sums
from ...common.backend import INTERPRETED
from ...common.gpu import direct
from ...common.gpu.architecture import architecture
from ...common.gpu.launch import launch
from ...common.gpu.numerics import LOW, precision
from ...common.gpu.similarity import linear
from ...common.packed import check_sequences
from ...common.stateful import Plan
from ..contract import Options
from .config import DECODED, configuration, splits_for
from .gradient import chunk_gradients
from .maps import map_rows
from .output import read_sums
from .recurrent import walk
from .sums import scan_sums

State = list[Tensor]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    return_state: bool,
    save: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, State, State]:
    before = [x.contiguous() for x in initial_state[1:]]
    with_state = return_state or bool(before)
    if runs_direct(plan.form, q.dtype, with_state):
        return *_direct(q, k, v, key_mask, cu_seqlens, options), [], []
    call = Call(q, k, v, key_mask, cu_seqlens, options)
    out, l = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
    if walks(plan.form, q.shape[2], k.shape[2], options.is_causal, with_state):
        after = _walk(call, out, l, before, return_state)
    else:
        after = _chunked(call, out, l, before, return_state)
    state = [call.keys_seen(initial_state), *after] if return_state else []
    return out, l, state, []


def backward(
    dout: Tensor,
    dstate: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    l: Tensor,
    saved: State,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: State,
    options: Options,
    wanted: list[bool],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, State]:
    call = Call(q, k, v, key_mask, cu_seqlens, options)
    dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (q, k, v))
    want_initial = wanted[3] and bool(initial_state)
    before = [x.contiguous() for x in initial_state[1:]]
    after = [x.contiguous() for x in dstate]
    rows = Rows(rows_dense(dout), rows_dense(out), l.contiguous())
    config = call.config
    keys, dinitial = Sums.none(), Sums.none()
    if wanted[0]:
        keys = _scan(call, config.backward_chunk, before, keep_last=False)
    if wanted[1] or wanted[2] or want_initial:
        dinitial = _scan(call, config.backward_chunk, after, keep_last=want_initial, rows=rows)
    if any(wanted[:3]):
        _chunk_gradients(call, rows, keys, dinitial, (dq, dk, dv), wanted)
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
    features that grow fast."""
    return form == "direct" and not with_state and dtype != torch.float16


def walks(form: str, Tq: int, Tk: int, is_causal: bool, with_state: bool) -> bool:
    """Whether tokens are walked one by one: on request, or because they are few and there is a state to update."""
    few = with_state and max(Tq, Tk) <= DECODED and (is_causal or Tq == Tk == 1)
    return form == "recurrent" or few


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


class Call:
    """One call: its tensors with a last stride of 1, its sizes, and what every kernel of it is told."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
    ) -> None:
        self.q, self.k, self.v = rows_dense(q), rows_dense(k), rows_dense(v)
        self.key_mask, self.cu_seqlens = key_mask, cu_seqlens
        self.D, self.M = q.shape[3], v.shape[3]
        self.is_causal = options.is_causal
        self.sequences = q.shape[0]
        if cu_seqlens is not None:
            check_sequences(cu_seqlens, k.shape[2])
            self.cu_seqlens, self.sequences = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
        self.q_offset = min(max(options.q_offset, -q.shape[2]), k.shape[2]) if options.is_causal else 0
        self.config = configuration(architecture(q.device), q.dtype, self.D, self.M)
        self.common: dict[str, Any] = {
            "key_mask_ptr": None if key_mask is None else key_mask.view(torch.uint8),
            "cu_seqlens_ptr": self.cu_seqlens,
            "stride_mb": 0 if key_mask is None else key_mask.stride(0),
            "stride_mt": 0 if key_mask is None else key_mask.stride(1),
            "Hkv": k.shape[1],
            "Tq": q.shape[2],
            "Tk": k.shape[2],
            "q_offset": self.q_offset,
            "scale": options.scale,
            "G": q.shape[1] // k.shape[1],
            "D": self.D,
            "M": self.M,
            "MAP": options.feature_map,
            "NORMALIZE": options.normalize,
            "PACKED": cu_seqlens is not None,
            "MASKED": key_mask is not None,
        }
        # fp16 is multiplied as TF32: as many digits, and sums and their gradients stay in range.
        is_half = q.dtype == torch.float16
        self.product_dtype = torch.float32 if is_half else q.dtype
        in_tf32 = is_half and not INTERPRETED and not torch.version.hip
        self.products: dict[str, Any] = {
            "IS_CAUSAL": options.is_causal,
            "LOW": LOW[self.product_dtype],
            "PRECISION": "tf32" if in_tf32 else precision(q.dtype),
        }

    def places(self, chunk: int, from_keys: bool) -> tuple[int, int]:
        """How many tiles of rows (and keys) a grid holds for each batch element, and how often packed sequences take a
        place (layout.py)."""
        Tq, Tk = self.q.shape[2], self.k.shape[2]
        if self.cu_seqlens is not None:
            W = 1 if self.q_offset == 0 else 2
            return W * (Tk // chunk + self.sequences), W
        first, last = self.q_offset // chunk, triton.cdiv(Tq + self.q_offset, chunk)
        if from_keys:
            first, last = min(first, 0), max(last, triton.cdiv(Tk, chunk))
        return last - first, 1

    def keys_seen(self, initial_state: State) -> Tensor:
        """n of the state after this call."""
        if self.cu_seqlens is not None:
            ends = self.cu_seqlens.long()
            if self.key_mask is not None:
                counted = torch.nn.functional.pad(self.key_mask[0].cumsum(0), (1, 0))
                ends = counted[ends]
            n = ends[1:] - ends[:-1]
        elif self.key_mask is not None:
            n = self.key_mask.sum(1)
        else:
            n = torch.full((self.sequences,), self.k.shape[2], dtype=torch.int64, device=self.k.device)
        return n + initial_state[0] if initial_state else n


def _direct(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    is_causal, q_offset, scale, name, normalize = options
    if name != "identity":
        q, k = _mapped(rows_dense(q), rows_dense(k), name)
    return direct.forward(direct.Problem(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, linear(scale), normalize))


def _mapped(q: Tensor, k: Tensor, name: str) -> tuple[Tensor, Tensor]:
    fq, fk = (empty_in_storage_order(x, x.shape[3]) for x in (q, k))
    rows = 32
    q_programs, k_programs = (x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], rows) for x in (q, k))
    launch(
        map_rows,
        (q_programs + k_programs,),
        num_warps=4,
        num_stages=1,
        q_ptr=q,
        k_ptr=k,
        fq_ptr=fq,
        fk_ptr=fk,
        **strides(q=q, k=k, fq=fq, fk=fk),
        H=q.shape[1],
        Hkv=k.shape[1],
        Tq=q.shape[2],
        Tk=k.shape[2],
        q_programs=q_programs,
        D=q.shape[3],
        BLOCK_T=rows,
        BLOCK_D=padded(q.shape[3]),
        MAP=name,
        LOW=LOW[q.dtype],
    )
    return fq, fk


def _walk(call: Call, out: Tensor, l: Tensor, before: State, return_state: bool) -> State:
    Hkv = call.k.shape[1]
    columns = min(padded(call.M), max(16, 8192 // padded(call.D)))
    after = _empty_state(call, (call.sequences, Hkv)) if return_state else []
    launch(
        walk,
        (triton.cdiv(call.M, columns) * Hkv * call.sequences,),
        num_warps=4,
        num_stages=1,
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        out_ptr=out,
        l_ptr=l,
        **_pair("first", before),
        **_pair("last", after),
        **strides(q=call.q, k=call.k, v=call.v, o=out),
        BLOCK_D=padded(call.D),
        BLOCK_M=columns,
        HAS_FIRST=bool(before),
        HAS_LAST=return_state,
        **call.common,
    )
    return after


def _chunked(call: Call, out: Tensor, l: Tensor, before: State, return_state: bool) -> State:
    config = call.config
    keys = _scan(call, config.chunk, before, keep_last=return_state)
    places, W = call.places(config.chunk, from_keys=False)
    columns = min(config.columns, padded(call.M))
    launch(
        read_sums,
        (triton.cdiv(call.M, columns) * places * call.q.shape[1] * call.q.shape[0],),
        num_warps=config.output_warps,
        num_stages=1,
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        out_ptr=out,
        l_ptr=l,
        totals_ptr=keys.totals,
        sums_ptr=keys.sums,
        **strides(q=call.q, k=call.k, v=call.v, o=out),
        places=places,
        sequences=call.sequences,
        W=W,
        BLOCK_D=padded(call.D),
        BLOCK_M=columns,
        CHUNK=config.chunk,
        BLOCK_N=min(config.keys, config.chunk),
        SPLITS=keys.splits,
        **call.common,
        **call.products,
    )
    return keys.last


def _scan(call: Call, chunk: int, first: State, keep_last: bool, rows: Rows | None = None) -> Sums:
    """Sums over keys or, given `rows`, the gradients to them."""
    config, Hkv, S = call.config, call.k.shape[1], call.sequences
    block = min(config.features, padded(call.D))
    slices = triton.cdiv(call.D, block)
    length = (call.k if rows is None else call.q).shape[2]
    mean = length * call.k.shape[0] // S
    splits = splits_for(config, S * Hkv * slices, triton.cdiv(mean, chunk))
    stored = 0
    if call.is_causal:
        stored = call.k.shape[2] // chunk if call.cu_seqlens is not None else S * triton.cdiv(call.k.shape[2], chunk)
        stored += S if call.cu_seqlens is not None else 0
    stored += S * splits
    sums = call.k.new_empty(stored, Hkv, call.D, call.M, dtype=call.product_dtype)
    totals = call.k.new_empty(stored, Hkv, call.D, dtype=torch.float32)
    last = _empty_state(call, (S, splits, Hkv)) if keep_last else []
    x, w = (call.k, call.v) if rows is None else (call.q, rows.dout)
    out, l = (w, None) if rows is None else (rows.out, rows.l)
    launch(
        scan_sums,
        (slices * splits * Hkv * S,),
        num_warps=config.state_warps,
        num_stages=config.stages if rows is None else config.row_stages,
        x_ptr=x,
        w_ptr=w,
        out_ptr=out,
        l_ptr=l,
        totals_ptr=totals,
        sums_ptr=sums,
        **_pair("first", first),
        **_pair("last", last),
        **strides(x=x, w=w, o=out),
        OF_ROWS=rows is not None,
        BLOCK_D=block,
        BLOCK_M=padded(call.M),
        CHUNK=chunk,
        SPLITS=splits,
        HAS_FIRST=bool(first),
        HAS_LAST=keep_last,
        **call.common,
        **call.products,
    )
    return Sums(totals, sums, [x[:, 0] if splits == 1 else x.sum(1) for x in last], splits)


def _chunk_gradients(
    call: Call, rows: Rows, keys: Sums, dsums: Sums, gradients: tuple[Tensor, ...], wanted: list[bool]
) -> None:
    """Fill those of dq, dk and dv that are wanted."""
    config, (dq, dk, dv) = call.config, gradients
    places, W = call.places(config.backward_chunk, from_keys=True)
    block = min(config.gradient, max(padded(call.D), padded(call.M)))
    slices = triton.cdiv(max(call.D, call.M), block)
    launch(
        chunk_gradients,
        (slices * places * call.k.shape[1] * call.k.shape[0],),
        num_warps=config.gradient_warps,
        num_stages=1,
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        out_ptr=rows.out,
        dout_ptr=rows.dout,
        l_ptr=rows.l,
        totals_ptr=keys.totals,
        sums_ptr=keys.sums,
        dtotals_ptr=dsums.totals,
        dsums_ptr=dsums.sums,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        **strides(q=call.q, k=call.k, v=call.v, o=rows.out, do=rows.dout, dq=dq, dk=dk, dv=dv),
        places=places,
        sequences=call.sequences,
        W=W,
        BLOCK=block,
        CHUNK=config.backward_chunk,
        KEY_SPLITS=keys.splits,
        ROW_SPLITS=dsums.splits,
        DQ=wanted[0],
        DK=wanted[1],
        DV=wanted[2],
        **call.common,
        **call.products,
    )


def _pair(name: str, sums: State) -> dict[str, Tensor | None]:
    total, matrix = sums or (None, None)
    return {f"{name}_total_ptr": total, f"{name}_ptr": matrix}


def _empty_state(call: Call, leading: tuple[int, ...]) -> State:
    empty = call.k.new_empty
    return [empty(*leading, *size, dtype=torch.float32) for size in ((call.D,), (call.D, call.M))]


def strides(**tensors: Tensor) -> dict[str, int]:
    """stride_qb, stride_qh, stride_qt of q, and so on."""
    return {f"stride_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bht")}


def rows_dense(x: Tensor) -> Tensor:
    """x, or a copy if its last stride is not 1. Other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(size: int) -> int:
    """The tile side that holds `size`: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))
