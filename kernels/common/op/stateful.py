"""Attention ops that carry a state: one calling convention, one schema, one fake and one backward pass for all of them.

    <name>_fwd(q, k, v, key_mask?, cu_seqlens?, initial_state[], <options>,
        return_state, save, form, chunk_size, backend) -> (out, l, state[], saved[])
    <name>_bwd(dout, dstate[], q, k, v, out, l, saved[], key_mask?, cu_seqlens?, initial_state[], <options>,
        needs_grad[4], form, chunk_size, backend) -> (dq, dk, dv, dinitial_state[])

TF32 and nondeterministic sums follow PyTorch's global switches, as its own matrix products do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from linattn.kernels.common.op.allocation import accumulation_dtype, empty_in_storage_order, empty_row_sums
from linattn.kernels.common.op.double_backward import first_derivative_only
from linattn.kernels.common.op.registration import define

if TYPE_CHECKING:
    from collections.abc import Sequence

StateShapes = Callable[[int, int, int, int], list[tuple[int, ...]]]
"""`(sequences, Hkv, D, M)` -> the shapes of a state's tensors, n first."""
BACKEND_CHOOSES = 0


class Plan(NamedTuple):
    """How an op is to be computed.

    Attributes:
        form: "direct", "chunked" or "recurrent".
        backend: a name among the op's backends.
        chunk_size: keys of a chunk; 0 lets the backend choose.
    """

    form: str
    backend: str
    chunk_size: int = BACKEND_CHOOSES


class ForwardInputs(NamedTuple):
    """Hold what every backend's `forward` takes.

    Attributes:
        q, k, v: `[B, H, T, D]`, `[B, Hkv, Tk, D]`, `[B, Hkv, Tk, M]`, of any strides.
        key_mask: bool `[B, Tk]`, True for keys that count.
        cu_seqlens: `[S + 1]`, bounds of packed sequences; a backend checks their values.
        initial_state: canonical tensors, n first (linattn/states.py), or [].
        options: those of the op (kernels/<op>/contract.py).
        return_state: whether the state after all keys is asked for.
        save: whether a backward pass will follow.
        plan: form, backend and chunk size.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    initial_state: list[Tensor]
    options: Any
    return_state: bool
    save: bool
    plan: Plan

    @staticmethod
    def from_op(options: type, arguments: Sequence[Any]) -> ForwardInputs:
        """Gather the arguments of `<name>_fwd`, which has the fields of `options` one by one."""
        end = 6 + len(options._fields)  # type: ignore[attr-defined]
        return_state, save, form, chunk_size, backend = arguments[end:]
        plan = Plan(form, backend, chunk_size)
        named = options(*arguments[6:end])
        return ForwardInputs._make((*arguments[:6], named, return_state, save, plan))


class BackwardInputs(NamedTuple):
    """Hold what every backend's `backward` takes.

    Attributes:
        dout: the gradient of out.
        dstate: the gradients of the returned state without n, or [] if there is none.
        q, k, v, key_mask, cu_seqlens, initial_state, options, plan: see `ForwardInputs`.
        out, l, saved: what `forward` returned.
        needs_grad: which gradients are asked for, of q, k, v and the initial state; the others may hold anything.
    """

    dout: Tensor
    dstate: list[Tensor]
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    l: Tensor
    saved: list[Tensor]
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    initial_state: list[Tensor]
    options: Any
    needs_grad: list[bool]
    plan: Plan

    @staticmethod
    def from_op(options: type, arguments: Sequence[Any]) -> BackwardInputs:
        """Gather the arguments of `<name>_bwd`, which has the fields of `options` one by one."""
        end = 11 + len(options._fields)  # type: ignore[attr-defined]
        needs_grad, form, chunk_size, backend = arguments[end:]
        named = options(*arguments[11:end])
        return BackwardInputs._make((*arguments[:11], named, needs_grad, Plan(form, backend, chunk_size)))


Outputs = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]
"""out, the row sums l `[B, H, T]`, the state or [], and what the backward pass needs beyond out and l."""
Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]
"""dq, dk, dv and the gradients of the initial state without n, or []."""


class Implementation(Protocol):
    """A backend of an op with a state: a module of these functions.

    One that saves tensors also has `saved_like(inputs: ForwardInputs) -> list[tuple[shape, dtype]]`, which traced code
    needs beforehand; one whose kernels depend on the call has `describe(q, k, v, is_causal, form) -> str`.
    """

    def forward(self, inputs: ForwardInputs, /) -> Outputs:
        """Compute an op's results."""

    def backward(self, inputs: BackwardInputs, /) -> Gradients:
        """Compute an op's gradients."""


# ---- registration ----------------------------------------------------------------------------------------------------


class StatefulOp(NamedTuple):
    """An op of this calling convention.

    Attributes:
        name: "quadratic" defines `linattn::quadratic_fwd` and `linattn::quadratic_bwd`.
        options: a NamedTuple, whose fields `schema` declares in order.
        schema: see there.
        state_shapes: `(sequences, Hkv, D, M)` -> shapes of a state, n first.
        implementation: the name of a backend -> its module, imported when first called.
    """

    name: str
    options: type
    schema: str
    state_shapes: StateShapes
    implementation: Callable[[str], Implementation]

    def define(self, forward: Callable[..., Outputs], backward: Callable[..., Gradients]) -> None:
        """Register the two functions, which take an op's arguments one by one, for every device."""
        how = "str form, SymInt chunk_size, str backend"
        define(
            f"""{self.name}_fwd(
                Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, Tensor[] initial_state,
                {self.schema}, bool return_state, bool save, {how}
            ) -> (Tensor out, Tensor l, Tensor[] state, Tensor[] saved)""",
            self._forward_fake,
            forward,
        )
        define(
            f"""{self.name}_bwd(
                Tensor dout, Tensor[] dstate, Tensor q, Tensor k, Tensor v, Tensor out, Tensor l, Tensor[] saved,
                Tensor? key_mask, Tensor? cu_seqlens, Tensor[] initial_state, {self.schema}, bool[] needs_grad, {how}
            ) -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dinitial_state)""",
            self._backward_fake,
            backward,
        )

    def _forward_fake(self, *arguments: Any) -> Outputs:
        inputs = ForwardInputs.from_op(self.options, arguments)
        q, k, v = inputs.q, inputs.k, inputs.v
        state: list[Tensor] = []
        if inputs.return_state:
            n, *sums = self.state_shapes(sequence_count(q, inputs.cu_seqlens), k.shape[1], k.shape[3], v.shape[3])
            state = [k.new_empty(n, dtype=torch.int64)]
            state += [k.new_empty(shape, dtype=accumulation_dtype(k.dtype)) for shape in sums]
        saved: list[Tensor] = []
        saved_like = getattr(self.implementation(inputs.plan.backend), "saved_like", None)
        if inputs.save and saved_like:
            saved = [k.new_empty(shape, dtype=dtype) for shape, dtype in saved_like(inputs)]
        return empty_in_storage_order(q, v.shape[3]), empty_row_sums(q), state, saved

    def _backward_fake(self, *arguments: Any) -> Gradients:
        inputs = BackwardInputs.from_op(self.options, arguments)
        dq, dk, dv = (empty_in_storage_order(x, x.shape[3]) for x in (inputs.q, inputs.k, inputs.v))
        wants_initial = inputs.needs_grad[3]
        return dq, dk, dv, [x.new_empty(x.shape) for x in inputs.initial_state[1:]] if wants_initial else []


def sequence_count(q: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of states: packed sequences, or the batch size."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


# ---- autograd --------------------------------------------------------------------------------------------------------
#
# What the torch.autograd.Functions of the ops share. Their inputs are (options, return_state, how, q, k, v, key_mask,
# cu_seqlens, *initial_state), and their outputs (out, l, *state, *saved).


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], state_tensors: int) -> None:
    """Save the inputs, out, the row sums and what the backend adds; scores, features and states are recomputed."""
    ctx.options, return_state, ctx.how, *tensors = inputs
    out, l, *rest = output
    ctx.states = state_tensors if return_state else 0
    saved = rest[ctx.states :]
    ctx.mark_non_differentiable(l, *rest[: min(ctx.states, 1)], *saved)  # l, n and what only the backend reads
    ctx.save_for_backward(out, l, *tensors, *saved)
    ctx.count = len(tensors)
    ctx.set_materialize_grads(False)  # a state that nobody differentiates must not cost a pass over all features


def backward_arguments(ctx: Any, gradients: tuple[Tensor | None, ...], state_shapes: StateShapes) -> tuple[Any, ...]:
    """Return the arguments of `<name>_bwd`, from what was saved and the gradients of (out, l, *state, *saved)."""
    dout, _, *drest = gradients
    out, l, *tensors = ctx.saved_tensors
    (q, k, v, key_mask, cu_seqlens, *initial_state), saved = tensors[: ctx.count], tensors[ctx.count :]
    dout = torch.zeros_like(out) if dout is None else dout
    shapes = state_shapes(sequence_count(q, cu_seqlens), k.shape[1], k.shape[3], v.shape[3])
    dstate = materialize_state_grads(drest[1 : ctx.states], shapes[1:], k)
    needs_grad = [*ctx.needs_input_grad[3:6], any(ctx.needs_input_grad[8:])]
    inputs = (dout, dstate, q, k, v, out, l, saved, key_mask, cu_seqlens, initial_state)
    return (*inputs, *ctx.options, needs_grad, *ctx.how)


def materialize_state_grads(
    dstate: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], k: Tensor
) -> list[Tensor]:
    """Return the gradients of a returned state: [] if there is none, zeros for tensors that have none."""
    if all(x is None for x in dstate):
        return []
    zeros = (k.new_zeros(shape, dtype=accumulation_dtype(k.dtype)) for shape in shapes)
    return [zero if x is None else x for x, zero in zip(dstate, zeros, strict=True)]


def input_gradients(op: str, arguments: tuple[Any, ...], gradients: Gradients) -> tuple[Tensor | None, ...]:
    """Return what a Function's `backward` does, one entry for each of its inputs.

    `arguments` are those with which `<name>_bwd` gave `gradients`.
    """
    dout, dstate, q, k, v = arguments[:5]
    initial_state = arguments[10]
    dq, dk, dv, dinitial_state = gradients
    dq, dk, dv, *dinitial = first_derivative_only(op, (dq, dk, dv, *dinitial_state), (dout, *dstate, q, k, v))
    of_state = [None, *dinitial] if dinitial else [None] * len(initial_state)
    return None, None, None, dq, dk, dv, None, None, *of_state
