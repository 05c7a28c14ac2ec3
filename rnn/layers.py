"""One recurrent layer: the inputs of every step are projected at once, then a loop goes through time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.errors import ArgumentError, StateError, refusal, unknown_name
from linattn.recurrence import Activation, State, check_state, recur
from linattn.rnn.checks import check_size
from linattn.rnn.sequences import Sequences, sequences

if TYPE_CHECKING:
    from torch.nn.utils.rnn import PackedSequence

NONLINEARITIES = ("tanh", "relu", "identity")


class LSTMState(NamedTuple):
    """Hidden state `h` and cell `c`: `[B, H]` each from a layer, `[L, B, H]` each from a stack of L layers."""

    h: Tensor
    c: Tensor


class RecurrentModule(nn.Module, ABC):
    """Base of layers and stacks: modules that process sequences step by step."""

    input_size: int
    hidden_size: int

    @abstractmethod
    def run_recurrent(self, x: Sequences, initial: State | None, kept: list[State] | None) -> tuple[Tensor, State]:
        """Return all h `[B, T, H]`, 0 behind a sequence's end, and the last state of these checked inputs."""

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of each part of a state."""
        return (batch, self.hidden_size)


class HiddenStateModule(RecurrentModule):
    """Base of the modules whose state is h."""

    def forward(
        self,
        x: Tensor | PackedSequence,
        initial: Tensor | None = None,
        kept_states: list[Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over a batch of sequences; the classes below document the call."""
        given = sequences(x, lengths, self.input_size, next(self.parameters()))
        if initial is not None:
            check_state("initial", initial, self.state_shape(given.batch), given.padded)
        kept: list[State] | None = None if kept_states is None else []
        all_h, (last_h,) = self.run_recurrent(given, None if initial is None else (initial,), kept)
        if kept_states is not None and kept is not None:
            kept_states.extend(h for (h,) in kept)
        return given.like_given(all_h), last_h


class LSTMStateModule(RecurrentModule):
    """Base of the modules whose state is an LSTMState."""

    def forward(
        self,
        x: Tensor | PackedSequence,
        initial: tuple[Tensor, Tensor] | None = None,
        kept_states: list[LSTMState] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, LSTMState]:
        """Run over a batch of sequences; the classes below document the call."""
        given = sequences(x, lengths, self.input_size, next(self.parameters()))
        if initial is not None:
            initial = _check_pair(initial, self.state_shape(given.batch), given.padded)
        kept: list[State] | None = None if kept_states is None else []
        all_h, last = self.run_recurrent(given, initial, kept)
        if kept_states is not None and kept is not None:
            kept_states.extend(LSTMState(*state) for state in kept)
        return given.like_given(all_h), LSTMState(*last)


def _check_pair(initial: object, shape: tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of an LSTM's initial state, each of this shape, or raise StateError."""
    if not isinstance(initial, (tuple, list)) or len(initial) != 2:
        raise refusal(
            StateError,
            "the initial state does not fit an LSTM",
            given=type(initial).__name__,
            accepted="a pair (h, c) of tensors",
        )
    return check_state("initial h", initial[0], shape, x), check_state("initial c", initial[1], shape, x)


class RecurrentLayer(RecurrentModule):
    """Base of both layers: `weight_x [G H, F]`, `weight_h [G H, H]` and `bias [G H]` with the rows of G gates.

    Raises: ArgumentError (sizes).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        gates: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("input_size", input_size)
        check_size("hidden_size", hidden_size)
        self.input_size = input_size
        self.hidden_size = hidden_size
        rows = gates * hidden_size
        self.weight_x = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        self.weight_h = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        # Input weights within 1/sqrt(F) instead, as torch.nn.Linear draws them, learn the running average four times
        # worse: loss .019 and .023 against .0048 and .0037 (F = 1, H = 32, tanh, Adam 1e-4, 5,000 batches of 32).
        within = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -within, within)

    @torch.no_grad()
    def draw_orthogonal(self) -> None:
        """Draw the recurrent matrix of each gate anew, orthogonal: it keeps a state's length (Saxe et al. 2013)."""
        for gate in torch.split(self.weight_h, self.hidden_size):
            nn.init.orthogonal_(gate)

    @property
    @abstractmethod
    def cell(self) -> str | Activation:
        """The step that `linattn.recurrence.recur` computes."""

    def run_recurrent(self, x: Sequences, initial: State | None, kept: list[State] | None) -> tuple[Tensor, State]:
        """Project the inputs of all steps at once, then run the recurrence."""
        projected = F.linear(x.padded, self.weight_x, self.bias)
        return recur(projected, self.weight_h, initial, cell=self.cell, lengths=x.lengths, kept=kept)

    def extra_repr(self) -> str:
        """Name the sizes in the module's repr."""
        return f"{self.input_size}, {self.hidden_size}"


class RNNLayer(RecurrentLayer, HiddenStateModule):
    """Elman layer: `h_t = act(W_h h_{t-1} + W_x x_t + b)`, with one bias.

    Args:
        input_size: F, at least 1.
        hidden_size: H, at least 1.
        nonlinearity: "tanh", "relu", "identity", or any function of a tensor that keeps its shape.
        device, dtype: as for `torch.nn` modules.

    Parameters: `weight_x [H, F]`, `weight_h [H, H]`, `bias [H]`: H (F + H + 1) numbers, drawn uniformly within
    1/sqrt(H), as `torch.nn.RNN` does.

    Call: `layer(x, initial=None, kept_states=None, *, lengths=None) -> (all_h, last_h)`
        x: `[B, T, F]`, T >= 1, of the parameters' dtype and device (any under autocast), or a `PackedSequence`.
        initial: h_0 `[B, H]`, zero by default.
        kept_states: a list; every h_t `[B, H]` is appended with its gradient retained, so that after `backward()` its
            `.grad` is the full dL/dh_t through all later steps (the gradient at `all_h` is only the direct part).
        lengths: int64 `[B]`, 1 to T each: the steps of each sequence of a padded batch. What stands behind them in x is
            ignored, whatever it is.
        Returns all_h `[B, T, H]`, 0 in padding, packed if x was; and last_h `[B, H]`, the state at each sequence's end.

    Cost: 2 B T H (F + H) flops forward, memory O(B T H). The loop is `linattn.recurrence.recur`, which says what runs
    on which backend.

    Raises: ArgumentError (sizes, unknown nonlinearity, lengths), ShapeError, DtypeError, DeviceError (x), StateError
    (initial).

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
        nonlinearity: str | Activation = "tanh",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, 1, device=device, dtype=dtype)
        if isinstance(nonlinearity, str) and nonlinearity not in NONLINEARITIES:
            raise unknown_name("nonlinearity", nonlinearity, NONLINEARITIES)
        if not isinstance(nonlinearity, str) and not callable(nonlinearity):
            raise refusal(
                ArgumentError,
                "nonlinearity is no function",
                given=repr(nonlinearity),
                accepted="a name or a function of a tensor",
            )
        self.nonlinearity = nonlinearity

    @property
    def cell(self) -> str | Activation:
        """The nonlinearity: an Elman layer has no other parts."""
        return self.nonlinearity

    def extra_repr(self) -> str:
        """Name sizes and nonlinearity in the module's repr."""
        name = self.nonlinearity if isinstance(self.nonlinearity, str) else self.nonlinearity.__name__
        return f"{super().extra_repr()}, nonlinearity={name}"


class LSTMLayer(RecurrentLayer, LSTMStateModule):
    """Long short-term memory, one bias a gate.

        i, f, o = sigmoid(x_t U + h_{t-1} W + b)     g = tanh(x_t U + h_{t-1} W + b)     each with its own U, W, b
        C_t = f * C_{t-1} + i * g                    h_t = tanh(C_t) * o

    so dC_t/dC_{t-1} = f_t plus the terms through the gates: where f stays near 1, gradients survive many steps.

    Args:
        input_size: F, at least 1.
        hidden_size: H, at least 1.
        forget_bias: added to the bias of f as it is drawn; f starts near sigmoid(forget_bias).
        device, dtype: as for `torch.nn` modules.

    Parameters: `weight_x [4H, F]`, `weight_h [4H, H]`, `bias [4H]`, stacked in the order i, f, g, o (that of
    `torch.nn.LSTM`): 4 H (F + H + 1) numbers, drawn uniformly within 1/sqrt(H), as `torch.nn.LSTM` does.

    Call: `layer(x, initial=None, kept_states=None, *, lengths=None) -> (all_h, LSTMState(h, c))`
        x, lengths, all_h: as for `RNNLayer`.
        initial: a pair (h_0, c_0) of `[B, H]` tensors, zero by default.
        kept_states: a list; every LSTMState(h_t, C_t) is appended with gradients retained on both.
        The last state is that at each sequence's end, two `[B, H]` tensors.

    Cost: 8 B T H (F + H) flops forward, memory O(B T H).

    Raises: as `RNNLayer`.

    Source: Hochreiter and Schmidhuber, Long short-term memory, 1997; forget gate: Gers et al., 2000.

    >>> layer = LSTMLayer(2, 3)
    >>> all_h, (h, c) = layer(torch.randn(4, 5, 2))
    >>> all_h.shape, h.shape, c.shape
    (torch.Size([4, 5, 3]), torch.Size([4, 3]), torch.Size([4, 3]))
    """

    cell = "lstm"
    forget_bias = 0.0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, 4, device=device, dtype=dtype)
        self.forget_bias = forget_bias
        self._open_gate()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, then add `forget_bias`."""
        super().reset_parameters()
        self._open_gate()

    def _open_gate(self) -> None:
        with torch.no_grad():
            self.bias[self.hidden_size : 2 * self.hidden_size] += self.forget_bias
