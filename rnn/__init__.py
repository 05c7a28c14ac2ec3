"""Recurrent networks: layers, stacks, heads, beam search, and tasks with known answers.

Everything is batch-first, `[B, T, F]`. Layers and stacks share one call, `net(x, initial=None) -> (all_h, last_state)`,
so a sequence may be cut anywhere and continued from the state that the first piece returned. Imports point down:

    commands/           `linattn train names | names predict | train running-average`
    tasks/              surnames by language, the running average, the scalar RNN with gradients written out by hand
    decoding.py         language models as steps of a beam search
    beam.py             beam search over any autoregressive step
    heads.py            RecurrentRegressionModel, RecurrentClassifier
    linear_attention.py LinearAttentionLayer: causal linear attention as a recurrent layer
    stacks.py           RNN, LSTM: several layers, in both directions if asked; state dicts to and from torch.nn
    layers.py           RNNLayer, LSTMLayer: one layer and its equations
    sequences.py        sequences of several lengths in one batch, padded or packed
    checks.py           accepted arguments, as typed errors

Example:
    >>> import torch
    >>> from linattn.rnn import LSTM
    >>> net, x = LSTM(3, 8), torch.randn(2, 6, 3)
    >>> first, state = net(x[:, :4])
    >>> second, _ = net(x[:, 4:], state)
    >>> torch.allclose(torch.cat((first, second), 1), net(x)[0], atol=1e-6)
    True
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
