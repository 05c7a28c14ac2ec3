"""Call linear-time attention where scaled_dot_product_attention stood.

python examples/quickstart.py
"""

import torch
import torch.nn.functional as F

import linattn

q, k, v = (torch.randn(1, 8, 4096, 32, requires_grad=True) for _ in range(3))

out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # softmax, time N^2
out = linattn.quadratic_attention(q, k, v, is_causal=True, scale=32**-0.5)  # (1 + s)^2, time N from about N = D^2 on
out.square().mean().backward()
out = linattn.linear_attention(q, k, v, is_causal=True, feature_map="elu+1")  # phi(q).phi(k), time N

print(linattn.explain(q, k, v, kernel="quadratic", is_causal=True))  # the backend and form chosen, and why

# A sequence in pieces: the state stands in for all earlier keys.
first, rest = [x[:, :, :3000] for x in (q, k, v)], [x[:, :, 3000:] for x in (q, k, v)]
head, state = linattn.quadratic_attention(*first, is_causal=True, return_state=True)
tail = linattn.quadratic_attention(*rest, is_causal=True, initial_state=state)
whole = linattn.quadratic_attention(q, k, v, is_causal=True)
print("in pieces and at once:", (torch.cat((head, tail), 2) - whole).abs().max().item())
