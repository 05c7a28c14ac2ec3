"""Recurrent networks: layers, stacks, heads, beam search, and tasks with known answers.

Everything is batch-first, `[B, T, F]`. Layers and stacks share one call, `net(x, initial=None) -> (all_h, last_state)`,
so a sequence may be cut anywhere and continued from the state that the first piece returned.

    layers.py           RNNLayer, LSTMLayer: one layer and its equations
    stacks.py           RNN, LSTM: several layers, in both directions if asked; state dicts to and from torch.nn
    sequences.py        sequences of several lengths in one batch, padded or packed
    heads.py            RecurrentRegressionModel, RecurrentClassifier
    linear_attention.py LinearAttentionLayer: causal linear attention as a recurrent layer
    beam.py             beam search over any autoregressive step
    decoding.py         language models as such steps
    names.py            surnames by language; name_model.py reads them; train_names.py, predict_name.py: commands
    scalar.py           the linear RNN of one number, with its gradients written out by hand
    running_average.py  the running-average task with its loss; train_running_average.py: a command
    training.py         what the training commands share
    checks.py           what the above accept, as typed errors
"""

from __future__ import annotations

from linattn.rnn.beam import BeamResult, beam_search
from linattn.rnn.decoding import RecurrentLM, prefix_step
from linattn.rnn.heads import RecurrentClassifier, RecurrentRegressionModel
from linattn.rnn.layers import LSTMLayer, LSTMState, RNNLayer
from linattn.rnn.linear_attention import LinearAttentionLayer
from linattn.rnn.stacks import LSTM, RNN, from_torch_state_dict, to_torch_state_dict
from linattn.rnn.tasks.running_average import running_average_batch, running_average_loss
from linattn.rnn.tasks.scalar import ScalarRNN, scalar_rnn

__all__ = [
    "LSTM",
    "RNN",
    "BeamResult",
    "LSTMLayer",
    "LSTMState",
    "LinearAttentionLayer",
    "RNNLayer",
    "RecurrentClassifier",
    "RecurrentLM",
    "RecurrentRegressionModel",
    "ScalarRNN",
    "beam_search",
    "from_torch_state_dict",
    "prefix_step",
    "running_average_batch",
    "running_average_loss",
    "scalar_rnn",
    "to_torch_state_dict",
]
