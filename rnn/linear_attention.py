"""Causal linear attention as what it is: a recurrent network whose state is a sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linattn.errors import ArgumentError, ShapeError, refusal, unknown_name
from linattn.feature_maps import CATALOGUE
from linattn.functional import linear_attention
from linattn.rnn.checks import check_sequence, check_size
from linattn.states import FeatureMapState

# Maps without parameters, whose similarity may be divided by its sum.
MAPS = {name: entry for name, entry in CATALOGUE.items() if entry.positive and entry.function is not None}


class LinearAttentionLayer(nn.Module):
    """Linear attention with the interface of a recurrent layer.

    Per head, with q, k, v = W_q x, W_k x, W_v x:

        S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)        h_t = S_t^T phi(q_t) / z_t . phi(q_t)

    An RNN whose state is the matrix S and the vector z, and whose recurrence is linear: no weight stands between a
    state and the next, so all steps can be computed at once, which is what calling the layer does. `step` does one.

    Args:
        input_size: F, at least 1.
        hidden_size: H, a multiple of `heads`.
        heads: each with D = M = H / heads.
        feature_map: phi, a name of `linattn.feature_maps` without parameters and never negative ("elu+1", "dpfp").
        device, dtype: as for `torch.nn` modules.

    Parameters: `weight_x [3 H, F]`, for q, k and v, drawn as `torch.nn.Linear` draws its own.

    Call: `layer(x, initial=None) -> (all_h, state)`
        x: `[B, T, F]`. initial, state: `linattn.FeatureMapState`, its tensors `[B, heads, ...]`; empty by default.
        Returns all_h `[B, T, H]`.

    Cost: 6 B T F H + O(B T H C) flops, with C features a head; the state takes heads C (D + 1) numbers a sequence,
    whatever T.

    Raises: ArgumentError (sizes, feature map), ShapeError, DtypeError, DeviceError (x), StateError (initial).

    Source: Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv:2006.16236).

    >>> layer = LinearAttentionLayer(2, 8, heads=2)
    >>> x = torch.randn(4, 5, 2)
    >>> all_h, state = layer(x)
    >>> h, state = layer.step(x[:, 0], None)
    >>> torch.allclose(h, all_h[:, 0], atol=1e-6)
    True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        heads: int = 1,
        feature_map: str = "elu+1",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("heads", heads)):
            check_size(name, size)
        if hidden_size % heads:
            raise refusal(
                ArgumentError,
                "hidden_size cannot be split",
                given=f"hidden_size={hidden_size} and heads={heads}",
                accepted="a multiple of heads",
            )
        if feature_map not in MAPS:
            raise unknown_name("feature map", feature_map, MAPS)
        self.input_size, self.hidden_size, self.heads, self.feature_map = input_size, hidden_size, heads, feature_map
        self.weight_x = nn.Parameter(torch.empty(3 * hidden_size, input_size, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.weight_x, a=5**0.5)

    def forward(self, x: Tensor, initial: FeatureMapState | None = None) -> tuple[Tensor, FeatureMapState]:
        """Run over a batch of sequences; see the class."""
        q, k, v = self._heads(check_sequence(x, self.input_size, self.weight_x))
        out, state = linear_attention(
            q, k, v, is_causal=True, feature_map=self.feature_map, initial_state=initial, return_state=True
        )
        return out.transpose(1, 2).flatten(2), state

    def step(self, x: Tensor, state: FeatureMapState | None) -> tuple[Tensor, FeatureMapState]:
        """Do one step, written out: x `[B, F]` -> h `[B, H]` and the state after it.

        Raises: ShapeError, DtypeError, DeviceError.
        """
        if not isinstance(x, Tensor) or x.dim() != 2:
            given = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise refusal(ShapeError, "x has the wrong shape", given=given, accepted=f"[B, {self.input_size}]")
        q, k, v = (y[:, :, 0] for y in self._heads(check_sequence(x[:, None], self.input_size, self.weight_x)))
        D = self.hidden_size // self.heads
        phi, C = MAPS[self.feature_map].function, MAPS[self.feature_map].size(D)
        assert phi is not None
        if state is None:
            state = FeatureMapState.empty(x.shape[0], self.heads, C, D, dtype=x.dtype, device=x.device)
        f_sum = state.f_sum + phi(k)
        fv = state.fv + phi(k)[..., None] * v[..., None, :]
        total = (f_sum * phi(q)).sum(-1, keepdim=True)
        h = (phi(q)[..., None, :] @ fv)[..., 0, :] / total.where(total > 0, torch.inf)
        return h.flatten(1), FeatureMapState(state.n + 1, f_sum, fv)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x `[B, T, F]` to q, k and v `[B, heads, T, D]`."""
        wide = nn.functional.linear(x, self.weight_x).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = wide.permute(2, 0, 3, 1, 4)
        return q, k, v

    def extra_repr(self) -> str:
        """Name sizes, heads and feature map in the module's repr."""
        return f"{self.input_size}, {self.hidden_size}, heads={self.heads}, feature_map={self.feature_map!r}"
