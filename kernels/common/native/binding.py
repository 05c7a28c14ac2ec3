"""The way from tensors to the native C++ kernels of all ops: addresses and strides in, two functions an op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linattn._native import AttentionProblem, capability
from linattn.kernels.common.op.allocation import empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.stateful import sequence_count
from linattn.kernels.common.op.varlen import sequence_bounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs, StateShapes

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Strided = tuple[int, ...]
NOT_NEEDED = (0,) * 5


class NativeCall(NamedTuple):
    """A call's `_native.AttentionProblem`, and the tensors that must outlive it."""

    problem: AttentionProblem
    tensors: tuple[Tensor | None, ...]


def prepare(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, options: Any
) -> NativeCall:
    """Describe a call, as all ops do. Raises ArgumentError unless cu_seqlens partitions the rows."""
    (B, H, Tq, D), (_, Hkv, Tk, M) = q.shape, v.shape
    sequences = B
    if cu_seqlens is not None:
        sequence_bounds(cu_seqlens, Tq)
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
        sequences = cu_seqlens.shape[0] - 1
    q, k, v = unit_last_stride(q), unit_last_stride(k), unit_last_stride(v)
    key_mask = None if key_mask is None else key_mask.contiguous()
    problem = AttentionProblem(
        DTYPES[q.dtype], (B, H, Hkv, Tq, Tk, D, M), strided(q), strided(k), strided(v), address(key_mask),
        address(cu_seqlens), sequences, options.is_causal, options.q_offset, options.scale, options.normalize,
        torch.get_num_threads(),
    )  # fmt: skip
    return NativeCall(problem, (q, k, v, key_mask, cu_seqlens))


def unit_last_stride(x: Tensor) -> Tensor:
    """Return x, copied if its last stride is not 1."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def strided(x: Tensor) -> Strided:
    """Return the address and strides of a tensor whose last stride is 1."""
    return (x.data_ptr(), *x.stride())


def address(x: Tensor | None) -> int:
    """Return where a tensor lies, or 0 for none."""
    return 0 if x is None else x.data_ptr()


def forward(
    inputs: ForwardInputs, native_forward: Callable[..., None], native_options: Any, state_shapes: StateShapes
) -> Outputs:
    """Allocate the outputs of an op with a state and let its C++ function, `<op>_forward`, fill them."""
    q, k, v = inputs.q, inputs.k, inputs.v
    call = prepare(q, k, v, inputs.key_mask, inputs.cu_seqlens, inputs.options)
    out, l = empty_in_storage_order(q, v.shape[3]), empty_row_sums(q)
    before = [x.contiguous() for x in inputs.initial_state]
    after = _empty_state(inputs, state_shapes) if inputs.return_state else []
    native_forward(
        call.problem, native_options, strided(out), address(l), list(map(address, before)), list(map(address, after))
    )
    return out, l, after, []


def backward(inputs: BackwardInputs, native_backward: Callable[..., None], native_options: Any) -> Gradients:
    """Allocate the gradients of an op with a state and let its C++ function, `<op>_backward`, fill them."""
    q, k, v = inputs.q, inputs.k, inputs.v
    call = prepare(q, k, v, inputs.key_mask, inputs.cu_seqlens, inputs.options)
    dout, out, l = unit_last_stride(inputs.dout), unit_last_stride(inputs.out), inputs.l.contiguous()
    before, dafter = [x.contiguous() for x in inputs.initial_state], [x.contiguous() for x in inputs.dstate]
    *needs_qkv, needs_initial = inputs.needs_grad
    dq, dk, dv = gradients = [empty_in_storage_order(x, x.shape[3]) for x in (q, k, v)]
    filled = [strided(x) if needed else NOT_NEEDED for x, needed in zip(gradients, needs_qkv, strict=True)]
    dbefore = [torch.empty_like(x) for x in before[1:]] if needs_initial else []
    native_backward(
        call.problem, native_options, strided(out), address(l), list(map(address, before)), strided(dout), *filled,
        _without_n(dafter), _without_n(dbefore),
    )  # fmt: skip
    return dq, dk, dv, dbefore


def _empty_state(inputs: ForwardInputs, state_shapes: StateShapes) -> list[Tensor]:
    k, v = inputs.k, inputs.v
    n, *sums = state_shapes(sequence_count(k, inputs.cu_seqlens), k.shape[1], k.shape[3], v.shape[3])
    return [k.new_empty(n, dtype=torch.int64), *(k.new_empty(shape, dtype=torch.float32) for shape in sums)]


def _without_n(state: list[Tensor]) -> list[int]:
    """Return the addresses of the gradients of a state, of which n has none."""
    return [0, *map(address, state)] if state else []


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """Return the kernels that a call runs, in words."""
    return f"{form} C++ kernels on {capability()}, {torch.get_num_threads()} threads"
