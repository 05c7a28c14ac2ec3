"""The linear RNN of one number, `h_t = w (u_t + h_{t-1})`: backpropagation through time on paper.

For three inputs, with p = u1, q = w p, r = q + u2, s = w r, t = s + u3, y = w t, the weight is used on three edges:

    y = w^3 u1 + w^2 u2 + w u3
    dy/dw = t + r dy/ds + p dy/dq = t + w r + w^2 p = 3 w^2 u1 + 2 w u2 + u3
    dy/dp = w^3

Each use of w contributes its own term, and the terms add up: that sum is all there is to sharing weights over time. The
factor w^(T-t) in front of step t vanishes for |w| < 1 and explodes for |w| > 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from linattn.errors import ArgumentError, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ScalarRNN:
    """A scalar linear RNN run forward and backward, all values in closed form.

    y: the last state h_T.
    states: h_1 ... h_T.
    edge_gradients: the part of dy/dw through each use of w, one a step; they sum to `weight_gradient`.
    weight_gradient: dy/dw.
    input_gradients: dy/du_1 ... dy/du_T; the first is dy/dp of the worked example.
    """

    y: float
    states: tuple[float, ...]
    edge_gradients: tuple[float, ...]
    weight_gradient: float
    input_gradients: tuple[float, ...]


def scalar_rnn(weight: float, inputs: Sequence[float]) -> ScalarRNN:
    """Run `h_t = w (u_t + h_{t-1})`, h_0 = 0, over any number of inputs, with its analytic gradients.

    `y = sum_t w^(T-t+1) u_t`, `dy/du_t = w^(T-t+1)`, `dy/dw = sum_t (u_t + h_{t-1}) w^(T-t)`. O(T) time and memory.

    Args:
        weight: w, finite.
        inputs: u_1 ... u_T, at least one, finite.

    Raises: ArgumentError for no inputs or a value that is not finite.

    >>> run = scalar_rnn(2.0, [1.0, 10.0, 100.0])
    >>> run.y, run.weight_gradient, run.input_gradients
    (248.0, 152.0, (8.0, 4.0, 2.0))
    >>> run.edge_gradients
    (4.0, 24.0, 124.0)
    """
    if len(inputs) == 0:
        raise refusal(ArgumentError, "inputs are empty", given="none", accepted="at least one number")
    if not all(map(math.isfinite, (weight, *inputs))):
        raise refusal(
            ArgumentError,
            "weight or inputs are NaN or infinite",
            given=f"weight {weight!r} and inputs {list(inputs)!r}",
            accepted="finite numbers",
        )

    states: list[float] = []
    before_weight: list[float] = []
    h = 0.0
    for u in inputs:
        before_weight.append(u + h)
        h = weight * (u + h)
        states.append(h)

    edge_gradients = [0.0] * len(inputs)
    input_gradients = [0.0] * len(inputs)
    dy_dh = 1.0
    for t in reversed(range(len(inputs))):
        edge_gradients[t] = before_weight[t] * dy_dh
        dy_dh *= weight
        input_gradients[t] = dy_dh
    return ScalarRNN(h, tuple(states), tuple(edge_gradients), sum(edge_gradients), tuple(input_gradients))
