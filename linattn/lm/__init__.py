"""The character language model: text, model, training, generation."""

from __future__ import annotations

from linattn.lm.model import CausalLM, CausalLMConfig, Sampler
from linattn.lm.text import Characters, Trigram

__all__ = ["CausalLM", "CausalLMConfig", "Characters", "Sampler", "Trigram"]
