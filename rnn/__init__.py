"""Recurrent networks: layers, stacks, a regression head, and small tasks with known answers.

Everything is batch-first, `[B, T, F]`. Layers and stacks share one call, `net(x, initial=None) -> (all_h, last_state)`,
so a sequence may be cut anywhere and continued from the state that the first piece returned.

    layers.py        RNNLayer, LSTMLayer: one layer, its equations, its loop over time
    stacks.py        RNN, LSTM: several layers; state dicts to and from torch.nn
    regression.py    RecurrentRegressionModel, and the running-average task with its loss
    scalar.py        the linear RNN of one number, with its gradients written out by hand
    checks.py        what the above accept, as typed errors
"""

from __future__ import annotations

from linattn.rnn.layers import LSTMLayer, LSTMState, RNNLayer
from linattn.rnn.regression import RecurrentRegressionModel, running_average_batch, running_average_loss
from linattn.rnn.scalar import ScalarRNN, scalar_rnn
from linattn.rnn.stacks import LSTM, RNN, from_torch_state_dict, to_torch_state_dict

__all__ = [
    "LSTM",
    "RNN",
    "LSTMLayer",
    "LSTMState",
    "RNNLayer",
    "RecurrentRegressionModel",
    "ScalarRNN",
    "from_torch_state_dict",
    "running_average_batch",
    "running_average_loss",
    "scalar_rnn",
    "to_torch_state_dict",
]
