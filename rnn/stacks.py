"""Several recurrent layers, each over the hidden states of the one below; state dicts to and from torch.nn."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError, refusal
from linattn.rnn.checks import check_size
from linattn.rnn.layers import HiddenStateModule, LSTMLayer, LSTMStateModule, RecurrentLayer, RecurrentModule, RNNLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from linattn.recurrence import Activation, State
    from linattn.rnn.sequences import Sequences


class _Stack(RecurrentModule):
    """Layers `layers[l]` run forwards; `reverse_layers[l]` of a bidirectional stack run backwards over the same."""

    def __init__(
        self,
        make: Callable[[int], RecurrentLayer],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        check_size("num_layers", num_layers)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = 2 * hidden_size if bidirectional else hidden_size
        inputs = [input_size, *[self.output_size] * (num_layers - 1)]
        self.layers = nn.ModuleList(map(make, inputs))
        self.reverse_layers = nn.ModuleList(map(make, inputs)) if bidirectional else None

    @property
    def state_count(self) -> int:
        """Layers times directions: the leading size of a state."""
        return len(self.layers) * (1 if self.reverse_layers is None else 2)

    def state_shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape of each part of a state: layers and directions come first."""
        return (self.state_count, batch, self.hidden_size)

    def run_recurrent(self, x: Sequences, initial: State | None, kept: list[State] | None) -> tuple[Tensor, State]:
        """Return the top layer's outputs, and the last states of all layers, stacked; forwards first in each layer."""
        last: list[State] = []

        def run_layer(layer: nn.Module, x: Sequences) -> Tensor:
            assert isinstance(layer, RecurrentLayer)
            before = None if initial is None else tuple(half[len(last)] for half in initial)
            all_h, state = layer.run_recurrent(x, before, kept)
            last.append(state)
            return all_h

        for level, layer in enumerate(self.layers):
            all_h = run_layer(layer, x)
            if self.reverse_layers is not None:
                backwards = x._replace(padded=run_layer(self.reverse_layers[level], x.reversed())).reversed().padded
                all_h = torch.cat((all_h, backwards), -1)
            x = x._replace(padded=all_h)
        return x.padded, tuple(map(torch.stack, zip(*last, strict=True)))


class RNN(_Stack, HiddenStateModule):
    """A stack of `RNNLayer`: `h^l_t = act(W_h h^l_{t-1} + W_x h^{l-1}_t + b)` with h^0 = x.

    Args:
        input_size: F, at least 1.
        hidden_size: H of every layer, at least 1.
        num_layers: L, at least 1.
        nonlinearity: as for `RNNLayer`.
        bidirectional: every layer reads its input in both directions, with weights of their own, and outputs both
            states side by side, `[h forwards, h backwards]`.
        device, dtype: as for `torch.nn` modules.

    With D = 2 for a bidirectional stack, else 1, the attribute `output_size` is D H, the width of what it returns.

    Call: `net(x, initial=None, kept_states=None, *, lengths=None) -> (all_h, last_h)`
        x, lengths: as for `RNNLayer`. initial: `[D L, B, H]`, zero by default.
        kept_states: as for `RNNLayer`; all steps of the first layer come first, D L T tensors in all. A layer that
            reads backwards keeps its states in the order in which it meets them.
        Returns all_h `[B, T, D H]` of the top layer and last_h `[D L, B, H]`, the last state of each layer, forwards
        before backwards, as `torch.nn.RNN` does.

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
        nonlinearity: str | Activation = "tanh",
        *,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def make(inputs: int) -> RNNLayer:
            return RNNLayer(inputs, hidden_size, nonlinearity, device=device, dtype=dtype)

        super().__init__(make, input_size, hidden_size, num_layers, bidirectional)


class LSTM(_Stack, LSTMStateModule):
    """A stack of `LSTMLayer`, each over the hidden states of the one below.

    Args:
        input_size: F, at least 1.
        hidden_size: H of every layer, at least 1.
        num_layers: L, at least 1.
        bidirectional: as for `RNN`.
        forget_bias: as for `LSTMLayer`.
        device, dtype: as for `torch.nn` modules.

    Call: `net(x, initial=None, kept_states=None, *, lengths=None) -> (all_h, LSTMState(h, c))`
        x, lengths: as for `RNNLayer`. initial: a pair (h, c) of `[D L, B, H]` tensors, zero by default.
        kept_states: as for `LSTMLayer`, in the order of `RNN`.
        Returns all_h `[B, T, D H]` of the top layer and the last state of each layer, two `[D L, B, H]` tensors.

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
        bidirectional: bool = False,
        forget_bias: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def make(inputs: int) -> LSTMLayer:
            return LSTMLayer(inputs, hidden_size, forget_bias=forget_bias, device=device, dtype=dtype)

        super().__init__(make, input_size, hidden_size, num_layers, bidirectional)


PARAMETERS = {"weight_x", "weight_h", "bias"}


def to_torch_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state dict of an `RNN` or `LSTM` of this package into one for `torch.nn.RNN` or `torch.nn.LSTM`.

    torch.nn keeps two biases a gate and adds them: ours becomes `bias_ih`, and `bias_hh` is zero. Gate order is equal.
    Tensors are shared with `state`, not copied.

    Raises: ArgumentError for a key that is not `layers.<l>.weight_x`, `.weight_h` or `.bias`, with `reverse_` before it
    or not, or a missing one.

    >>> theirs = nn.LSTM(2, 3, num_layers=2, batch_first=True)
    >>> theirs.load_state_dict(to_torch_state_dict(LSTM(2, 3, 2).state_dict()))
    <All keys matched successfully>
    """
    pattern = r"(?P<reverse>reverse_)?layers\.(?P<level>\d+)\.(?P<name>weight_x|weight_h|bias)"
    converted = {}
    for (level, is_reverse), tensors in _by_layer(state, pattern, PARAMETERS).items():
        end = f"_l{level}_reverse" if is_reverse else f"_l{level}"
        converted["weight_ih" + end] = tensors["weight_x"]
        converted["weight_hh" + end] = tensors["weight_h"]
        converted["bias_ih" + end] = tensors["bias"]
        converted["bias_hh" + end] = torch.zeros_like(tensors["bias"])
    return converted


def from_torch_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state dict of a `torch.nn.RNN` or `torch.nn.LSTM` into one for this package's stacks.

    The two biases are added; a model built with `bias=False` gets a zero bias. Weights are shared, not copied.

    Raises: ArgumentError for keys of a projected model, or any other unknown or missing key.

    >>> ours = RNN(2, 3, 2)
    >>> ours.load_state_dict(from_torch_state_dict(nn.RNN(2, 3, num_layers=2).state_dict()))
    <All keys matched successfully>
    """
    pattern = r"(?P<name>weight_ih|weight_hh|bias_ih|bias_hh)_l(?P<level>\d+)(?P<reverse>_reverse)?"
    converted = {}
    for (level, is_reverse), tensors in _by_layer(state, pattern, {"weight_ih", "weight_hh"}).items():
        no_bias = tensors["weight_hh"].new_zeros(tensors["weight_hh"].shape[0])
        start = f"{'reverse_' if is_reverse else ''}layers.{level}."
        converted[start + "weight_x"] = tensors["weight_ih"]
        converted[start + "weight_h"] = tensors["weight_hh"]
        converted[start + "bias"] = tensors.get("bias_ih", no_bias) + tensors.get("bias_hh", no_bias)
    return converted


def _by_layer(
    state: Mapping[str, Tensor], pattern: str, required: set[str]
) -> dict[tuple[int, bool], dict[str, Tensor]]:
    layers: dict[tuple[int, bool], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(pattern, key)
        if match is None:
            raise refusal(
                ArgumentError, "unexpected key in the state dict", given=repr(key), accepted=f"keys matching {pattern}"
            )
        layers.setdefault((int(match["level"]), match["reverse"] is not None), {})[match["name"]] = tensor
    directions = {is_reverse for _, is_reverse in layers} | {False}
    for level in range(max((level for level, _ in layers), default=0) + 1):
        for is_reverse in directions:
            missing = required - layers.get((level, is_reverse), {}).keys()
            if missing:
                which = "reverse layer" if is_reverse else "layer"
                raise refusal(
                    ArgumentError,
                    f"the state dict lacks {', '.join(sorted(missing))} of {which} {level}",
                    given="the other keys",
                    accepted="every parameter of every layer",
                )
    return layers
