"""The Triton backend of the quadratic ops: which kernels a call runs on.

Direct form: `direct`, or `chunked` where a state stands before or after. Chunked form: `chunked`. A few tokens beside a
state: `step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from linattn.kernels.quadratic.gpu import chunked, direct, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs

AnyInputs = TypeVar("AnyInputs", "ForwardInputs", "BackwardInputs")


def forward(inputs: ForwardInputs) -> Outputs:
    """Run the kernels of the form that `inputs.plan` names, or those of a few tokens beside a state."""
    if step.runs(inputs.q, inputs.k, inputs.cu_seqlens, inputs.initial_state):
        return step.forward(inputs)
    if inputs.plan.form == "chunked" or inputs.initial_state:
        return chunked.forward(_direct_unless_chunked(inputs))
    out, l = direct.forward(inputs)
    return out, l, chunked.state_after(inputs) if inputs.return_state else [], []


def saved_like(inputs: ForwardInputs) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of what `forward` saves."""
    is_step = step.runs(inputs.q, inputs.k, inputs.cu_seqlens, inputs.initial_state)
    if is_step or (inputs.plan.form != "chunked" and not inputs.initial_state):
        return []
    return chunked.saved_like(_direct_unless_chunked(inputs))


def backward(inputs: BackwardInputs) -> Gradients:
    """Run the backward kernels of the form that `inputs.plan` names."""
    if inputs.plan.form == "chunked" or inputs.initial_state or inputs.dstate:
        return chunked.backward(_direct_unless_chunked(inputs))
    return *direct.backward(inputs), []


def _direct_unless_chunked(inputs: AnyInputs) -> AnyInputs:
    """Turn the recurrent form of one token into the direct form, which it is."""
    return inputs if inputs.plan.form == "chunked" else inputs._replace(plan=inputs.plan._replace(form="direct"))


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """The kernels that a call runs, and their configuration."""
    if form == "recurrent":
        return step.describe(q, v)
    return chunked.describe(q, k, v, is_causal) if form == "chunked" else direct.describe(q, v)
