"""Feature-map linear attention in plain PyTorch: any device, fp64 too. A polynomial similarity of degree 1 in
phi(q).phi(k).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from linattn.kernels.common.op.allocation import accumulation_dtype, empty_in_storage_order
from linattn.kernels.common.reference import attention
from linattn.kernels.common.reference.problem import Problem
from linattn.kernels.feature_map.maps import MAPS

if TYPE_CHECKING:
    from torch import Tensor

    from linattn.kernels.common.op.stateful import BackwardInputs, ForwardInputs, Gradients, Outputs

LINEAR = (0.0, 1.0, 0.0)


def forward(inputs: ForwardInputs) -> Outputs:
    """Compute the op's results."""
    return attention.forward(_problem(inputs), inputs)


def backward(inputs: BackwardInputs) -> Gradients:
    """Compute the op's gradients, and take those of the features on to q and k."""
    dfq, dfk, dv, dinitial = attention.backward(_problem(inputs), inputs)
    dq, dk = _pullback(inputs.options.feature_map, dfq, inputs.q), _pullback(inputs.options.feature_map, dfk, inputs.k)
    if inputs.key_mask is not None:  # padding may hold NaN, where a map has no slope
        dk.masked_fill_(~inputs.key_mask[:, None, :, None], 0)
    return dq, dk, dv, dinitial


def _problem(inputs: ForwardInputs | BackwardInputs) -> Problem:
    is_causal, q_offset, scale, name, normalize = inputs.options
    q, k, dtype = inputs.q, inputs.k, accumulation_dtype(inputs.q.dtype)
    if name != "identity":
        phi = MAPS[name].phi
        q, k = phi(q.to(dtype)), phi(k.to(dtype))
    tensors = (q, k, inputs.v, inputs.key_mask)
    return Problem(*tensors, is_causal, q_offset, scale, coefficients=LINEAR, normalize=normalize, degree=1)


def _pullback(feature_map: str, dphi: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x, given that of phi(x)."""
    slope = MAPS[feature_map].slope
    return empty_in_storage_order(x, x.shape[3]).copy_(dphi * slope(x.to(dphi.dtype)))
