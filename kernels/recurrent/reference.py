"""The loop over time in plain PyTorch: any device, any dtype, every derivative by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""(h,) of an Elman cell, (h, c) of an LSTM; `[B, H]` each."""
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda z: z}


def recur(
    projected: Tensor,
    weight_h: Tensor,
    initial: State,
    lengths: Tensor | None,
    cell: str | Activation,
    kept: list[State] | None = None,
) -> tuple[Tensor, State]:
    """All h `[B, T, H]` and the last state. `kept` is given every state, with its gradient retained."""
    state, all_h = initial, []
    recurrent = weight_h.t()
    for t, projected_t in enumerate(projected.unbind(1)):
        after = _step(cell, torch.addmm(projected_t, state[0], recurrent), state)
        if lengths is not None:
            runs = (t < lengths)[:, None]
            after = tuple(torch.where(runs, new, old) for new, old in zip(after, state, strict=True))
        if kept is not None:
            for tensor in after:
                if tensor.requires_grad:
                    tensor.retain_grad()
            kept.append(after)
        state = after
        all_h.append(state[0] if lengths is None else state[0] * runs)
    return torch.stack(all_h, 1), state


def _step(cell: str | Activation, z: Tensor, state: State) -> State:
    if cell == "lstm":
        i, f, g, o = z.chunk(4, dim=-1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return c.tanh() * o.sigmoid(), c
    activation = ACTIVATIONS[cell] if isinstance(cell, str) else cell
    return (activation(z),)
