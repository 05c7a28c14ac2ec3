"""The character language model: text, model, training, generation.

Example:
    >>> import torch
    >>> from linattn.lm import CausalLM, CausalLMConfig
    >>> model = CausalLM(CausalLMConfig(vocabulary=65, kernel="elu+1", layers=1, dim=32, heads=2))
    >>> model.generate(torch.tensor([[7]]), 5, temperature=0).shape
    torch.Size([1, 6])
"""

from __future__ import annotations

from linattn.lm.model import CausalLM, CausalLMConfig, Sampler
from linattn.lm.text import Characters, Trigram, consecutive_windows, random_windows, trigram_loss

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "Characters",
    "Sampler",
    "Trigram",
    "consecutive_windows",
    "random_windows",
    "trigram_loss",
]
