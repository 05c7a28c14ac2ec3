"""Run a Llama of Hugging Face transformers with quadratic attention, and generate in constant memory.

python examples/hf.py        needs pip install 'linattn[hf]'
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from linattn.integrations import hf

hf.register()
torch.manual_seed(0)
config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM._from_config(config, attn_implementation="linattn_quadratic")

tokens = torch.randint(3, 99, (2, 12))
loss = model(tokens, labels=tokens).loss
loss.backward()
print(f"loss {loss.item():.3f}")

# The argument is called past_key_values before transformers 5.24.
out = model.generate(tokens, max_new_tokens=20, do_sample=False, cache=hf.StateCache(), pad_token_id=0)
print("generated", tuple(out.shape), "with sums over keys in place of keys")
