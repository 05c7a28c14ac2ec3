"""Several recurrent layers, each reading the hidden states of the one below; state dicts to and from torch.nn."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError
from linattn.rnn.checks import check_sequence, check_size, check_state
from linattn.rnn.layers import LSTMLayer, LSTMState, Nonlinearity, RNNLayer, state_pair


class RNN(nn.Module):
    """A stack of `RNNLayer`: `h^l_t = act(W_h h^l_{t-1} + W_x h^{l-1}_t + b)` with h^0 = x.

    Args:
        input_size: F, at least 1.
        hidden_size: H of every layer, at least 1.
        num_layers: L, at least 1.
        nonlinearity: as for `RNNLayer`.
        device, dtype: as for `torch.nn` modules.

    Call: `net(x, initial=None, kept_states=None) -> (all_h, last_h)`
        x: `[B, T, F]`. initial: `[L, B, H]`, zero by default.
        kept_states: as for `RNNLayer`; all steps of the first layer come first, L T tensors in all.
        Returns all_h `[B, T, H]` of the top layer and last_h `[L, B, H]`, the last step of each layer.

    Raises: as `RNNLayer`.

    >>> net = RNN(2, 3, 2)
    >>> x = torch.randn(4, 6, 2)
    >>> whole, _ = net(x)
    >>> first, state = net(x[:, :4])
    >>> second, _ = net(x[:, 4:], state)
    >>> torch.allclose(whole, torch.cat([first, second], 1), atol=1e-6)
    True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str | Nonlinearity = "tanh",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_layers", num_layers)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.layers = nn.ModuleList(
            RNNLayer(hidden_size if level else input_size, hidden_size, nonlinearity, device=device, dtype=dtype)
            for level in range(num_layers)
        )

    def forward(
        self, x: Tensor, initial: Tensor | None = None, kept_states: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        check_sequence(x, self.input_size, next(self.parameters()))
        if initial is not None:
            check_state("initial", initial, (len(self.layers), x.shape[0], self.hidden_size), x)
        last_h = []
        for level, layer in enumerate(self.layers):
            x, last = layer(x, None if initial is None else initial[level], kept_states)
            last_h.append(last)
        return x, torch.stack(last_h)


class LSTM(nn.Module):
    """A stack of `LSTMLayer`, each reading the hidden states of the one below.

    Args:
        input_size: F, at least 1.
        hidden_size: H of every layer, at least 1.
        num_layers: L, at least 1.
        device, dtype: as for `torch.nn` modules.

    Call: `net(x, initial=None, kept_states=None) -> (all_h, LSTMState(h, c))`
        x: `[B, T, F]`. initial: a pair (h, c) of `[L, B, H]` tensors, zero by default.
        kept_states: as for `LSTMLayer`; all steps of the first layer come first, L T states in all.
        Returns all_h `[B, T, H]` of the top layer and the last state of each layer, two `[L, B, H]` tensors.

    Raises: as `LSTMLayer`.

    >>> all_h, (h, c) = LSTM(2, 3, num_layers=2)(torch.randn(4, 5, 2))
    >>> all_h.shape, h.shape, c.shape
    (torch.Size([4, 5, 3]), torch.Size([2, 4, 3]), torch.Size([2, 4, 3]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("num_layers", num_layers)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.layers = nn.ModuleList(
            LSTMLayer(hidden_size if level else input_size, hidden_size, device=device, dtype=dtype)
            for level in range(num_layers)
        )

    def forward(
        self,
        x: Tensor,
        initial: tuple[Tensor, Tensor] | None = None,
        kept_states: list[LSTMState] | None = None,
    ) -> tuple[Tensor, LSTMState]:
        check_sequence(x, self.input_size, next(self.parameters()))
        if initial is not None:
            shape = (len(self.layers), x.shape[0], self.hidden_size)
            h, c = state_pair(initial)
            initial = check_state("initial h", h, shape, x), check_state("initial c", c, shape, x)
        last_h, last_c = [], []
        for level, layer in enumerate(self.layers):
            x, last = layer(x, None if initial is None else (initial[0][level], initial[1][level]), kept_states)
            last_h.append(last.h)
            last_c.append(last.c)
        return x, LSTMState(torch.stack(last_h), torch.stack(last_c))


def to_torch_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state dict of an `RNN` or `LSTM` of this package into one for `torch.nn.RNN` or `torch.nn.LSTM`.

    torch.nn keeps two biases a gate and adds them: ours becomes `bias_ih`, and `bias_hh` is zero. Gate order is equal.
    Tensors are shared with `state`, not copied.

    Raises: ArgumentError for a key that is not `layers.<l>.weight_x`, `.weight_h` or `.bias`, or a missing one.

    >>> theirs = nn.LSTM(2, 3, num_layers=2, batch_first=True)
    >>> theirs.load_state_dict(to_torch_state_dict(LSTM(2, 3, 2).state_dict()))
    <All keys matched successfully>
    """
    levels = _by_level(state, r"layers\.(\d+)\.(weight_x|weight_h|bias)", required={"weight_x", "weight_h", "bias"})
    converted = {}
    for level, tensors in sorted(levels.items()):
        converted[f"weight_ih_l{level}"] = tensors["weight_x"]
        converted[f"weight_hh_l{level}"] = tensors["weight_h"]
        converted[f"bias_ih_l{level}"] = tensors["bias"]
        converted[f"bias_hh_l{level}"] = torch.zeros_like(tensors["bias"])
    return converted


def from_torch_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state dict of a one-directional `torch.nn.RNN` or `torch.nn.LSTM` into one for this package's stacks.

    The two biases are added; a model built with `bias=False` gets a zero bias. Weights are shared, not copied.

    Raises: ArgumentError for keys of a bidirectional or projected model, or any other unknown or missing key.

    >>> ours = RNN(2, 3, 2)
    >>> ours.load_state_dict(from_torch_state_dict(nn.RNN(2, 3, num_layers=2).state_dict()))
    <All keys matched successfully>
    """
    levels = _by_level(state, r"(weight_ih|weight_hh|bias_ih|bias_hh)_l(\d+)", required={"weight_ih", "weight_hh"})
    converted = {}
    for level, tensors in sorted(levels.items()):
        no_bias = tensors["weight_hh"].new_zeros(tensors["weight_hh"].shape[0])
        converted[f"layers.{level}.weight_x"] = tensors["weight_ih"]
        converted[f"layers.{level}.weight_h"] = tensors["weight_hh"]
        converted[f"layers.{level}.bias"] = tensors.get("bias_ih", no_bias) + tensors.get("bias_hh", no_bias)
    return converted


def _by_level(state: Mapping[str, Tensor], pattern: str, required: set[str]) -> dict[int, dict[str, Tensor]]:
    levels: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            raise ArgumentError(f"unexpected key {key!r} in the state dict; accepted: keys matching {pattern}")
        level, name = sorted(match.groups(), key=str.isdigit, reverse=True)
        levels.setdefault(int(level), {})[name] = tensor
    for index in range(max(levels, default=0) + 1):
        missing = required - levels.get(index, {}).keys()
        if missing:
            raise ArgumentError(f"the state dict lacks {', '.join(sorted(missing))} of layer {index}")
    return levels
