"""Decode token by token in constant memory: the cache holds sums over keys, not the keys.

python examples/decode.py
"""

import torch

from linattn.lm import CausalLM, CausalLMConfig

torch.manual_seed(0)
model = CausalLM(CausalLMConfig(vocabulary=65, kernel="quadratic", layers=2, dim=32, heads=2)).eval()
prompt = torch.randint(65, (1, 300))

with torch.no_grad():
    cache = model.decode_cache()
    token = model(prompt, cache=cache)[:, -1:].argmax(-1)
    tokens = [token]
    for step in range(1, 401):
        token = model(token, cache=cache)[:, -1:].argmax(-1)
        tokens.append(token)
        if step % 100 == 0:
            print(f"after {prompt.shape[1] + step} tokens the cache holds {cache.nbytes / 2**10:.0f} KiB")

    # The cache is exact: the whole text at once predicts the same tokens.
    text = torch.cat((prompt, *tokens), 1)
    again = model(text[:, :-1])[:, prompt.shape[1] - 1 :].argmax(-1)
print("the same tokens as without a cache:", torch.equal(again, torch.cat(tokens, 1)))
