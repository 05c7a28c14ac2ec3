"""One recurrent layer: the inputs of every step are projected at once, then a loop walks through time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.errors import ArgumentError, StateError, unknown_name
from linattn.rnn.checks import check_sequence, check_size, check_state

Nonlinearity = Callable[[Tensor], Tensor]


class LSTMState(NamedTuple):
    """Hidden state `h` and cell `c`: `[B, H]` each from a layer, `[L, B, H]` each from a stack of L layers."""

    h: Tensor
    c: Tensor


class RNNLayer(nn.Module):
    """Elman layer: `h_t = act(W_h h_{t-1} + W_x x_t + b)`, with one bias.

    Args:
        input_size: F, at least 1.
        hidden_size: H, at least 1.
        nonlinearity: "tanh", "relu", "identity", or any function of a tensor that keeps its shape.
        device, dtype: as for `torch.nn` modules.

    Parameters: `weight_x [H, F]`, `weight_h [H, H]`, `bias [H]`: H (F + H + 1) numbers, drawn uniformly within
    1/sqrt(H), as `torch.nn.RNN` does.

    Call: `layer(x, initial=None, kept_states=None) -> (all_h, last_h)`
        x: `[B, T, F]`, T >= 1, of the parameters' dtype and device (any under autocast).
        initial: h_0 `[B, H]`, zero by default.
        kept_states: a list; every h_t `[B, H]` is appended with its gradient retained, so that after `backward()` its
            `.grad` is the full dL/dh_t through all later steps (the gradient at `all_h` is only the direct part).
        Returns all_h `[B, T, H]` and last_h = h_T `[B, H]`.

    Cost: 2 B T H (F + H) flops forward, memory O(B T H).

    Raises: ArgumentError (sizes, unknown nonlinearity), ShapeError, DtypeError, DeviceError (x), StateError (initial).

    Source: Elman, Finding structure in time, 1990.

    >>> layer = RNNLayer(2, 3)
    >>> all_h, last_h = layer(torch.randn(4, 5, 2))
    >>> all_h.shape, torch.equal(all_h[:, -1], last_h)
    (torch.Size([4, 5, 3]), True)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        nonlinearity: str | Nonlinearity = "tanh",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.nonlinearity = _nonlinearity(nonlinearity)
        self.weight_x = nn.Parameter(torch.empty(hidden_size, input_size, device=device, dtype=dtype))
        self.weight_h = nn.Parameter(torch.empty(hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        _draw(self.weight_x, self.weight_h, self.bias)

    def forward(
        self, x: Tensor, initial: Tensor | None = None, kept_states: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        check_sequence(x, self.input_size, self.weight_x)
        projected = F.linear(x, self.weight_x, self.bias)
        shape = (x.shape[0], self.hidden_size)
        h = projected.new_zeros(shape) if initial is None else check_state("initial", initial, shape, x)

        recur = self.weight_h.t()
        all_h = []
        for projected_t in projected.unbind(1):
            h = self.nonlinearity(torch.addmm(projected_t, h, recur))
            if kept_states is not None:
                kept_states.append(_retained(h))
            all_h.append(h)
        return torch.stack(all_h, 1), h

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, nonlinearity={getattr(self.nonlinearity, '__name__', '?')}"


class LSTMLayer(nn.Module):
    """Long short-term memory, one bias a gate:

        i, f, o = sigmoid(x_t U + h_{t-1} W + b)     g = tanh(x_t U + h_{t-1} W + b)     each with its own U, W, b
        C_t = f * C_{t-1} + i * g                    h_t = tanh(C_t) * o

    so dC_t/dC_{t-1} = f_t plus the terms through the gates: where f stays near 1, gradients survive many steps.

    Args:
        input_size: F, at least 1.
        hidden_size: H, at least 1.
        device, dtype: as for `torch.nn` modules.

    Parameters: `weight_x [4H, F]`, `weight_h [4H, H]`, `bias [4H]`, stacked in the order i, f, g, o (that of
    `torch.nn.LSTM`): 4 H (F + H + 1) numbers, drawn uniformly within 1/sqrt(H), as `torch.nn.LSTM` does.

    Call: `layer(x, initial=None, kept_states=None) -> (all_h, LSTMState(h, c))`
        x: `[B, T, F]`, T >= 1, of the parameters' dtype and device (any under autocast).
        initial: a pair (h_0, c_0) of `[B, H]` tensors, zero by default.
        kept_states: a list; every LSTMState(h_t, C_t) is appended with gradients retained on both.
        Returns all_h `[B, T, H]` and the last state, two `[B, H]` tensors.

    Cost: 8 B T H (F + H) flops forward, memory O(B T H).

    Raises: ArgumentError (sizes), ShapeError, DtypeError, DeviceError (x), StateError (initial).

    Source: Hochreiter and Schmidhuber, Long short-term memory, 1997; forget gate: Gers et al., 2000.

    >>> layer = LSTMLayer(2, 3)
    >>> all_h, (h, c) = layer(torch.randn(4, 5, 2))
    >>> all_h.shape, h.shape, c.shape
    (torch.Size([4, 5, 3]), torch.Size([4, 3]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_x = nn.Parameter(torch.empty(4 * hidden_size, input_size, device=device, dtype=dtype))
        self.weight_h = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        _draw(self.weight_x, self.weight_h, self.bias)

    def forward(
        self,
        x: Tensor,
        initial: tuple[Tensor, Tensor] | None = None,
        kept_states: list[LSTMState] | None = None,
    ) -> tuple[Tensor, LSTMState]:
        check_sequence(x, self.input_size, self.weight_x)
        projected = F.linear(x, self.weight_x, self.bias)
        h, c = self._initial(initial, x, projected)

        recur = self.weight_h.t()
        all_h = []
        for projected_t in projected.unbind(1):
            i, f, g, o = torch.addmm(projected_t, h, recur).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = c.tanh() * o.sigmoid()
            if kept_states is not None:
                kept_states.append(LSTMState(_retained(h), _retained(c)))
            all_h.append(h)
        return torch.stack(all_h, 1), LSTMState(h, c)

    def _initial(self, initial: tuple[Tensor, Tensor] | None, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        shape = (x.shape[0], self.hidden_size)
        if initial is None:
            return projected.new_zeros(shape), projected.new_zeros(shape)
        h, c = state_pair(initial)
        return check_state("initial h", h, shape, x), check_state("initial c", c, shape, x)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


def state_pair(initial: object) -> tuple[Tensor, Tensor]:
    """Return the two halves of an LSTM's initial state, or raise StateError."""
    if not isinstance(initial, (tuple, list)) or len(initial) != 2:
        raise StateError(f"the initial state of an LSTM must be a pair (h, c) of tensors, got {type(initial).__name__}")
    return initial[0], initial[1]


def _identity(x: Tensor) -> Tensor:
    return x


_NONLINEARITIES: dict[str, Nonlinearity] = {"tanh": torch.tanh, "relu": torch.relu, "identity": _identity}


def _nonlinearity(given: str | Nonlinearity) -> Nonlinearity:
    if isinstance(given, str):
        if given not in _NONLINEARITIES:
            raise unknown_name("nonlinearity", given, _NONLINEARITIES)
        return _NONLINEARITIES[given]
    if not callable(given):
        raise ArgumentError(f"nonlinearity must be a name or a function of a tensor, got {given!r}")
    return given


def _draw(weight_x: Tensor, weight_h: Tensor, bias: Tensor) -> None:
    # Input weights within 1/sqrt(F) instead, as torch.nn.Linear draws them, learn the running average four times worse:
    # loss .019 and .023 against .0048 and .0037 (F = 1, H = 32, tanh, Adam 1e-4, 5,000 batches of 32, seeds 0 and 1).
    within = 1 / math.sqrt(weight_h.shape[1])
    for parameter in (weight_x, weight_h, bias):
        nn.init.uniform_(parameter, -within, within)


def _retained(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.retain_grad()
    return h
