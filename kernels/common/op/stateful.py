"""Attention ops that carry a state: one schema, one fake and one autograd.Function for all of them.

    <name>_fwd(q, k, v, key_mask?, cu_seqlens?, initial_state[], <options>,
        return_state, save, form, chunk_size, backend) -> (out, l, state[], saved[])
    <name>_bwd(dout, dstate[], q, k, v, out, l, saved[], key_mask?, cu_seqlens?, initial_state[], <options>,
        wanted[4], form, chunk_size, backend) -> (dq, dk, dv, dinitial_state[])

l: row sums `[B, H, T]`. state, initial_state: canonical tensors, n first (linattn/states.py), or []; dstate and
dinitial_state: the same without n, or [] if there is none or it is not wanted. save: whether a backward pass will
follow; saved: what the backend then keeps for it beyond out and l, of the shapes and dtypes that its module's function
`saved_like` declares, if it has one (most keep nothing). wanted: which gradients are read, q, k, v, initial state; the
others may hold anything. form: "direct", "chunked" or "recurrent". chunk_size: 0 lets the backend choose. TF32 and
nondeterministic sums follow PyTorch's global switches, as its own matrix products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from linattn.kernels.common.op.allocation import accumulation_dtype, empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.double_backward import derivative_wanted, distinct, first_derivative_only
from linattn.kernels.common.op.registration import define, implementation

if TYPE_CHECKING:
    from linattn.kernels.common.op.backend import Backend

StateShapes = Callable[[int, int, int, int], list[tuple[int, ...]]]
BACKEND_CHOOSES = 0


class Plan(NamedTuple):
    """How an op is to be computed."""

    form: str
    backend: str
    chunk_size: int = BACKEND_CHOOSES


class StatefulOp:
    """An op of this calling convention.

    Its backends are modules with `forward(q, k, v, key_mask, cu_seqlens, initial_state, options, return_state, save,
    plan)` and `backward(dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state, options, wanted,
    plan)`. One that saves has `saved_like(q, k, v, cu_seqlens, initial_state, options, plan)`, shapes and dtypes,
    which traced code needs beforehand.
    """

    def __init__(
        self, name: str, options: type, schema: str, state_shapes: StateShapes, backends: dict[str, Backend]
    ) -> None:
        """`schema` declares the fields of `options`, a NamedTuple, in order; `state_shapes(sequences, Hkv, D, M)`."""
        self.options, self.state_shapes, self.backends = options, state_shapes, backends
        self.width = len(options._fields)  # type: ignore[attr-defined]
        self.state_tensors = len(state_shapes(1, 1, 1, 1))
        how = "str form, SymInt chunk_size, str backend"
        forward = f"""{name}_fwd(
            Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, Tensor[] initial_state,
            {schema}, bool return_state, bool save, {how}
        ) -> (Tensor out, Tensor l, Tensor[] state, Tensor[] saved)"""
        backward = f"""{name}_bwd(
            Tensor dout, Tensor[] dstate, Tensor q, Tensor k, Tensor v, Tensor out, Tensor l, Tensor[] saved,
            Tensor? key_mask, Tensor? cu_seqlens, Tensor[] initial_state, {schema}, bool[] wanted, {how}
        ) -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dinitial_state)"""
        define(forward, self._forward_fake, self._forward)
        define(backward, self._backward_fake, self._backward)

    def _forward(self, *arguments: Any) -> Any:
        tensors, options = arguments[:6], self.options(*arguments[6 : 6 + self.width])
        return_state, save, form, chunk_size, backend = arguments[6 + self.width :]
        plan = Plan(form, backend, chunk_size)
        return implementation(self.backends, backend).forward(*tensors, options, return_state, save, plan)

    def _backward(self, *arguments: Any) -> Any:
        tensors, options = arguments[:11], self.options(*arguments[11 : 11 + self.width])
        wanted, form, chunk_size, backend = arguments[11 + self.width :]
        plan = Plan(form, backend, chunk_size)
        return implementation(self.backends, backend).backward(*tensors, options, wanted, plan)

    def _forward_fake(self, q, k, v, key_mask, cu_seqlens, initial_state, *rest):
        return_state, save, form, chunk_size, backend = rest[self.width :]
        state, saved = [], []
        if return_state:
            sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            n, *sums = self.state_shapes(sequences, k.shape[1], k.shape[3], v.shape[3])
            state = [k.new_empty(n, dtype=torch.int64)]
            state += [k.new_empty(shape, dtype=accumulation_dtype(k.dtype)) for shape in sums]
        saved_like = getattr(implementation(self.backends, backend), "saved_like", None)
        if save and saved_like:
            options, plan = self.options(*rest[: self.width]), Plan(form, backend, chunk_size)
            like = saved_like(q, k, v, cu_seqlens, initial_state, options, plan)
            saved = [k.new_empty(shape, dtype=dtype) for shape, dtype in like]
        return empty_in_storage_order(q, v.shape[3]), empty_row_sums(q), state, saved

    def _backward_fake(self, dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state, *rest):
        gradients = [empty_in_storage_order(x, x.shape[3]) for x in (q, k, v)]
        wanted = rest[self.width]
        return *gradients, [x.new_empty(x.shape) for x in initial_state[1:]] if wanted[3] else []


OPS: dict[str, StatefulOp] = {}


def define_stateful(
    name: str, options: type, schema: str, state_shapes: StateShapes, backends: dict[str, Backend]
) -> None:
    OPS[name] = StatefulOp(name, options, schema, state_shapes, backends)


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: tuple[Tensor, ...],
    options: tuple[Any, ...],
    return_state: bool,
    plan: Plan,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Call an op, through autograd only if a gradient may be asked for. Returns out and the state."""
    how = (plan.form, plan.chunk_size, plan.backend)
    if derivative_wanted(q, k, v, *initial_state):
        inputs = (*distinct(q, k, v), key_mask, cu_seqlens, *initial_state)
        out, _, *rest = Attend.apply(op, tuple(options), return_state, how, *inputs)
        return out, tuple(rest[: OPS[op].state_tensors if return_state else 0])
    forward = getattr(torch.ops.linattn, op + "_fwd")
    masks = (key_mask, cu_seqlens)
    out, _, state, _ = forward(q, k, v, *masks, list(initial_state), *options, return_state, False, *how)
    return out, tuple(state)


class Attend(torch.autograd.Function):
    """Saves the inputs, out, the row sums and what the backend adds; scores, features and states are recomputed."""

    @staticmethod
    def forward(op, options, return_state, how, q, k, v, key_mask, cu_seqlens, *initial_state):
        forward = getattr(torch.ops.linattn, op + "_fwd")
        inputs = (q, k, v, key_mask, cu_seqlens, list(initial_state))
        out, l, state, saved = forward(*inputs, *options, return_state, True, *how)
        return (out, l, *state, *saved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op, ctx.options, return_state, ctx.how, *tensors = inputs
        out, l, *rest = output
        ctx.states = OPS[ctx.op].state_tensors if return_state else 0
        saved = rest[ctx.states :]
        ctx.mark_non_differentiable(l, *rest[: min(ctx.states, 1)], *saved)  # l, n and what only the backend reads
        ctx.save_for_backward(out, l, *tensors, *saved)
        ctx.count = len(tensors)
        ctx.set_materialize_grads(False)  # a state that nobody differentiates must not cost a pass over all features

    @staticmethod
    def backward(ctx, dout, dl, *drest):
        out, l, *tensors = ctx.saved_tensors
        (q, k, v, key_mask, cu_seqlens, *initial_state), saved = tensors[: ctx.count], tensors[ctx.count :]
        dout = torch.zeros_like(out) if dout is None else dout
        dstate = _given(drest[1 : ctx.states], OPS[ctx.op], q, k, v, cu_seqlens)
        wanted = [*ctx.needs_input_grad[4:7], any(ctx.needs_input_grad[9:])]
        backward = getattr(torch.ops.linattn, ctx.op + "_bwd")
        inputs = (dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state)
        dq, dk, dv, dinitial = backward(*inputs, *ctx.options, wanted, *ctx.how)
        gradients = (dq, dk, dv, *dinitial)
        dq, dk, dv, *dinitial = first_derivative_only(ctx.op, gradients, (dout, *dstate, q, k, v))
        dinitial = [None, *dinitial] if dinitial else [None] * len(initial_state)
        return None, None, None, None, dq, dk, dv, None, None, *dinitial


def _given(dstate, op, q, k, v, cu_seqlens):
    """The gradients to a returned state: [] if there is none, zeros for tensors that have none."""
    if all(x is None for x in dstate):
        return []
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = op.state_shapes(sequences, k.shape[1], k.shape[3], v.shape[3])[1:]
    zeros = (k.new_zeros(shape, dtype=accumulation_dtype(k.dtype)) for shape in shapes)
    return [zero if x is None else x for x, zero in zip(dstate, zeros, strict=True)]
