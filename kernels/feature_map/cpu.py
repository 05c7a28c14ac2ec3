"""Feature-map attention by the native C++ kernels (cpu.hpp): CPU tensors in fp32, bf16 and fp16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.allocation import empty_in_storage_order, empty_row_sums
from ..common.cpu import address, prepared, strided, unit_last_stride
from ..common.stateful import Plan
from .contract import Options, state_shapes

MAPS = {"identity": 0, "elu+1": 1, "relu": 2, "relu2": 3, "exp": 4}
NOT_WANTED = (0, 0, 0, 0)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: list[Tensor],
    options: Options,
    return_state: bool,
    save: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    from linattn._native import feature_map_forward

    call = _prepared(q, k, v, key_mask, cu_seqlens, options)
    out, l = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
    before = [x.contiguous() for x in initial_state]
    after = _empty_state(k, v, cu_seqlens) if return_state else []
    feature_map_forward(
        call.problem, MAPS[options.feature_map], _chunk(plan), strided(out), address(l), _addresses(before),
        _addresses(after),
    )  # fmt: skip
    return out, l, after, []


def backward(
    dout: Tensor,
    dstate: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    l: Tensor,
    saved: list[Tensor],
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: list[Tensor],
    options: Options,
    wanted: list[bool],
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    from linattn._native import feature_map_backward

    call = _prepared(q, k, v, key_mask, cu_seqlens, options)
    dout, out, l = unit_last_stride(dout), unit_last_stride(out), l.contiguous()
    before, dafter = [x.contiguous() for x in initial_state], [x.contiguous() for x in dstate]
    gradients = [empty_in_storage_order(x, x.shape[3]) for x in (q, k, v)]
    dq, dk, dv = (strided(x) if want else NOT_WANTED for x, want in zip(gradients, wanted, strict=False))
    dbefore = [torch.empty_like(x) for x in before[1:]] if wanted[3] else []
    feature_map_backward(
        call.problem, MAPS[options.feature_map], _chunk(plan), strided(out), address(l), _addresses(before),
        strided(dout), dq, dk, dv,
        _addresses([None, *dafter] if dafter else []), _addresses([None, *dbefore] if dbefore else []),
    )  # fmt: skip
    return *gradients, dbefore  # type: ignore[return-value]


def _prepared(q, k, v, key_mask, cu_seqlens, options):
    shared = (options.is_causal, options.q_offset, options.scale, options.normalize)
    return prepared(q, k, v, key_mask, cu_seqlens, *shared)


def _chunk(plan: Plan) -> int:
    return 1 if plan.form == "recurrent" else plan.chunk_size


def _empty_state(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n, *sums = state_shapes(sequences, k.shape[1], k.shape[3], v.shape[3])
    return [k.new_empty(n, dtype=torch.int64), *(k.new_empty(shape, dtype=torch.float32) for shape in sums)]


def _addresses(state: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(address(x) for x in state) or (0,) * 3


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    from linattn._native import capability

    return f"{form} C++ kernels on {capability()}, {torch.get_num_threads()} threads"
