"""Backend "triton" of the quadratic ops (convention: kernels/common/op/stateful.py, maths: ../README.md).

Read downhill: this module (which form runs) -> `direct` (no state: kernels/common/gpu/direct), `decode` (a few tokens
beside a state) or `launch` (chunked; or direct beside a state), which runs, in order, `chunk_state` (with
`chunk_state_scan`), `chunk_output`; backward `bwd_preprocess`, `chunk_dq`, `chunk_dkv`, `cancelled_dkv` ->
`inter_chunk` (a tile times a state) -> `chunk_schedule` (which sequence, tokens and state a program works on). Beside
them `kernel_args` (sizes and shared arguments; `config` holds the tile sizes), `workspace` (memory) and `state_layout`
(states in memory).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from linattn.kernels.quadratic.gpu import decode, direct, launch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs

AnyInputs = TypeVar("AnyInputs", "ForwardInputs", "BackwardInputs")


def forward(inputs: ForwardInputs) -> Outputs:
    """Run the kernels of the form that `inputs.plan` names, or those of a few tokens beside a state."""
    if decode.applies(inputs.q, inputs.k, inputs.cu_seqlens, inputs.initial_state):
        return decode.forward(inputs)
    if inputs.plan.form == "chunked" or inputs.initial_state:
        return launch.forward(_direct_unless_chunked(inputs))
    out, l = direct.forward(inputs)
    return out, l, launch.state_after(inputs) if inputs.return_state else [], []


def saved_like(inputs: ForwardInputs) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shapes and dtypes of what `forward` saves."""
    is_decoding = decode.applies(inputs.q, inputs.k, inputs.cu_seqlens, inputs.initial_state)
    if is_decoding or (inputs.plan.form != "chunked" and not inputs.initial_state):
        return []
    return launch.saved_like(_direct_unless_chunked(inputs))


def backward(inputs: BackwardInputs) -> Gradients:
    """Run the backward kernels of the form that `inputs.plan` names."""
    if inputs.plan.form == "chunked" or inputs.initial_state or inputs.dstate:
        return launch.backward(_direct_unless_chunked(inputs))
    return *direct.backward(inputs), []


def _direct_unless_chunked(inputs: AnyInputs) -> AnyInputs:
    """Turn the recurrent form of one token into the direct form, which it is."""
    return inputs if inputs.plan.form == "chunked" else inputs._replace(plan=inputs.plan._replace(form="direct"))


def describe(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, form: str) -> str:
    """Name the kernels that a call runs, and their configuration."""
    if form == "recurrent":
        return decode.describe(q, v)
    return launch.describe(q, k, v, is_causal) if form == "chunked" else direct.describe(q, v)
