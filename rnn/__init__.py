"""Recurrent networks: layers, stacks, a regression head, and small tasks with known answers.

Everything is batch-first, `[B, T, F]`. Layers and stacks share one call, `net(x, initial=None) -> (all_h, last_state)`,
so a sequence may be cut anywhere and continued from the state that the first piece returned.

    layers.py           RNNLayer, LSTMLayer: one layer and its equations
    stacks.py           RNN, LSTM: several layers, in both directions if asked; state dicts to and from torch.nn
    sequences.py        sequences of several lengths in one batch, padded or packed
    heads.py            RecurrentRegressionModel, RecurrentClassifier
    scalar.py           the linear RNN of one number, with its gradients written out by hand
    running_average.py  the running-average task with its loss
    checks.py           what the above accept, as typed errors
"""

from __future__ import annotations

from linattn.rnn.heads import RecurrentClassifier, RecurrentRegressionModel
from linattn.rnn.layers import LSTMLayer, LSTMState, RNNLayer
from linattn.rnn.running_average import running_average_batch, running_average_loss
from linattn.rnn.scalar import ScalarRNN, scalar_rnn
from linattn.rnn.stacks import LSTM, RNN, from_torch_state_dict, to_torch_state_dict

__all__ = [
    "LSTM",
    "RNN",
    "LSTMLayer",
    "LSTMState",
    "RNNLayer",
    "RecurrentClassifier",
    "RecurrentRegressionModel",
    "ScalarRNN",
    "from_torch_state_dict",
    "running_average_batch",
    "running_average_loss",
    "scalar_rnn",
    "to_torch_state_dict",
]
