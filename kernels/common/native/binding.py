"""What the native C++ kernels of all ops share: tensors as addresses and strides, and an op of two functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linattn._native import Problem, capability
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.varlen import sequence_bounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from linattn.kernels.common.op.stateful import Plan, StateShapes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Strided = tuple[int, ...]
NOT_WANTED = (0,) * 5


class Prepared(NamedTuple):
    """A call's `_native.Problem`, and the tensors that must outlive it."""

    problem: Problem
    tensors: tuple[Tensor | None, ...]


def prepared(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Any
) -> Prepared:
    """What all ops share of a call. Raises ArgumentError unless cu_seqlens partitions the rows."""
    (B, H, Tq, D), (_, Hkv, Tk, M) = q.shape, v.shape
    sequences = B
    if cu_seqlens is not None:
        sequence_bounds(cu_seqlens, Tq)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        sequences = cu_seqlens.shape[0] - 1
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    key_mask = None if key_mask is None else key_mask.contiguous()
    problem = Problem(
        DTYPES[q.dtype], (B, H, Hkv, Tq, Tk, D, M), strided(q), strided(k), strided(v), address(key_mask),
        address(cu_seqlens), sequences, options.is_causal, options.q_offset, options.scale, options.normalize,
        torch.get_num_threads(),
    )  # fmt: skip
    return Prepared(problem, (q, k, v, key_mask, cu_seqlens))


def unit_last_stride(x: Tensor) -> Tensor:
    """x, copied if its last stride is not 1."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def strided(x: Tensor) -> Strided:
    """Address and strides of a tensor whose last stride is 1."""
    return (x.data_ptr(), *x.stride())


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class NativeOp:
    """An op of the native module, called by the convention of kernels/common/op/stateful.py.

    `native_options` turns an op's options and a plan into those of the C++ functions.
    """

    def __init__(
        self,
        native_forward: Callable[..., None],
        native_backward: Callable[..., None],
        native_options: Callable[[Any, Plan], Any],
        state_shapes: StateShapes,
    ) -> None:
        self.native_forward, self.native_backward = native_forward, native_backward
        self.native_options, self.state_shapes = native_options, state_shapes

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        initial_state: list[Tensor],
        options: Any,
        return_state: bool,
        save: bool,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        call = prepared(q, k, v, key_mask, cu_seqlens, options)
        out, l = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
        before = [x.contiguous() for x in initial_state]
        after = self._empty_state(k, v, cu_seqlens) if return_state else []
        self.native_forward(
            call.problem, self.native_options(options, plan), strided(out), address(l),
            list(map(address, before)), list(map(address, after)),
        )  # fmt: skip
        return out, l, after, []

    def backward(
        self,
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
        options: Any,
        wanted: list[bool],
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        call = prepared(q, k, v, key_mask, cu_seqlens, options)
        dout, out, l = unit_last_stride(dout), unit_last_stride(out), l.contiguous()
        before, dafter = [x.contiguous() for x in initial_state], [x.contiguous() for x in dstate]
        gradients = [empty_in_storage_order(x, x.shape[3]) for x in (q, k, v)]
        dq, dk, dv = (strided(x) if want else NOT_WANTED for x, want in zip(gradients, wanted, strict=False))
        dbefore = [torch.empty_like(x) for x in before[1:]] if wanted[3] else []
        self.native_backward(
            call.problem, self.native_options(options, plan), strided(out), address(l), list(map(address, before)),
            strided(dout), dq, dk, dv, _without_n(dafter), _without_n(dbefore),
        )  # fmt: skip
        return *gradients, dbefore  # type: ignore[return-value]

    def _empty_state(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        n, *sums = self.state_shapes(sequences, k.shape[1], k.shape[3], v.shape[3])
        return [k.new_empty(n, dtype=torch.int64), *(k.new_empty(shape, dtype=torch.float32) for shape in sums)]


def _without_n(state: list[Tensor]) -> list[int]:
    """Addresses of the gradients to a state, of which n has none."""
    return [0, *map(address, state)] if state else []


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    return f"{form} C++ kernels on {capability()}, {torch.get_num_threads()} threads"
