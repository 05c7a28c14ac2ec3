"""Replace softmax attention in a module of one's own: one line, the same layout and the same parameters.

python examples/drop_in.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linattn


class SelfAttention(nn.Module):
    """Attend causally with so many heads, by softmax or by the quadratic kernel."""

    def __init__(self, dim: int, heads: int, kernel: str) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, T, dim]` of x `[B, T, dim]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        if self.kernel == "softmax":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = linattn.quadratic_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5)
        return self.out(mixed.transpose(1, 2).flatten(2))


def train(kernel: str, steps: int = 60) -> float:
    """Learn to repeat the token before; return the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 32), SelfAttention(32, 2, kernel), nn.Linear(32, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens = torch.randint(16, (8, 64)).repeat_interleave(2, 1)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


for kernel in ("softmax", "quadratic"):
    print(f"{kernel}: loss {train(kernel):.3f}")
