"""Decoding: what stands in for the tokens so far, so that the next one costs no more than it must.

    cache = DecodeCache.of("quadratic", scale=0.125)
    out = cache(q, k, v)              the prompt: any number of tokens, causal
    out = cache(q_t, k_t, v_t)        then one token after another, or several

What a cache holds depends on the kernel:

    softmax               keys and values                              grows with every token
    quadratic, taylor     keys and values, until folding them into     grows up to the state's size, then constant
                          the state pays (`cost.fold_length`)
    feature maps          the state                                    constant

Both sides of a fold are exact: the state is the sum over the very keys that were kept. With `capacity` all shapes are
fixed from the first call on (for `torch.compile` without recompilation, CUDA graphs, `torch.export`): keys lie in
`capacity` slots; where the state will be the cheaper one at full capacity it is used from the start, beside the first
16 keys, whose rows are ill-conditioned through sums.

A cache is an `nn.Module` without parameters: `state_dict` and `load_state_dict` save and load it, `.to` moves it.
Nothing here has gradients.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from linattn import cost, functional
from linattn.errors import ArgumentError, ShapeError, StateError, refusal, unknown_name
from linattn.feature_maps import NAMES, FeatureMap
from linattn.kernels.common.op.conditioning import DIRECT_KEYS
from linattn.states import FeatureMapState, QuadraticState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

POLYNOMIAL = ("quadratic", "taylor")
SHORTEST_BUFFER = 64
OWN_OPTIONS = ("is_causal", "key_mask", "q_offset", "cu_seqlens", "initial_state", "return_state", "form")
EXTRA_STATE = "_extra_state"  # torch's name for what `get_extra_state` returns


class DecodeCache(nn.Module, ABC):
    """Stand in for the tokens that one attention layer has seen; make it with `DecodeCache.of`.

    Attributes:
        kernel: its name.
        seen: int64 [B], tokens of each sequence so far, padding not counted; None before the first call.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
        >>> cache = DecodeCache.of("taylor")
        >>> pieces = [cache(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 30), (30, 31), (31, 32))]
        >>> whole = linattn.attention(q, k, v, kernel="taylor", is_causal=True)
        >>> torch.allclose(torch.cat(pieces, dim=2), whole, atol=1e-5)
        True
    """

    seen: Tensor | None

    def __init__(self, kernel: str, attend: Callable[..., Any], capacity: int | None) -> None:
        super().__init__()
        self.kernel, self.attend, self.capacity = kernel, attend, capacity
        self.sizes: tuple[Any, ...] = ()
        self.register_buffer("seen", None)

    @staticmethod
    def of(
        kernel: FeatureMap, *, capacity: int | None = None, fold_at: int | None = None, **options: Any
    ) -> DecodeCache:
        """A new cache.

        Args:
            kernel: "softmax", "quadratic", "taylor", the name of a feature map, or a feature map itself.
            capacity: fixes all shapes; the largest number of tokens of a sequence. None: no limit, shapes may grow.
            fold_at: number of keys from which the quadratic kernels keep the state; `cost.fold_length` when not given.
            **options: of the kernel: scale, coefficients, normalize, enable_gqa, backend.

        Raises:
            ArgumentError: an unknown kernel, a capacity or fold_at below 1, an option that is the cache's own affair.
        """
        name = kernel if isinstance(kernel, str) else type(kernel).__name__
        for number, value in (("capacity", capacity), ("fold_at", fold_at)):
            if value is not None and value < 1:
                raise refusal(
                    ArgumentError, f"{number} is too small", given=f"{number}={value}", accepted="at least 1, or None"
                )
        for option in options:
            if option in OWN_OPTIONS:
                raise refusal(
                    ArgumentError,
                    f"a decoding cache is causal and sets {option} itself",
                    given=f"{option}={options[option]!r}",
                    accepted="a call without it",
                )
        if fold_at is not None and kernel not in POLYNOMIAL:
            raise refusal(
                ArgumentError,
                f"kernel {name!r} never turns keys into a state",
                given=f"fold_at={fold_at}",
                accepted=f"no fold_at, or one of the kernels {', '.join(POLYNOMIAL)}",
            )
        if not isinstance(kernel, str) or kernel in NAMES:
            attend = functools.partial(functional.linear_attention, feature_map=kernel, form="chunked", **options)
            return StateCache(name, attend, capacity)
        if kernel not in ("softmax", *POLYNOMIAL):
            raise unknown_name("kernel", kernel, ("softmax", *POLYNOMIAL, *NAMES))
        attend = functools.partial(functional.attention, kernel=kernel, **options)
        return (KeyCache if capacity is None else FixedKeyCache)(name, attend, capacity, fold_at)

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Attend causally to all tokens so far and to these, and hold these: -> [B, H, T, M].

        Args:
            q: queries [B, H, T, D].
            k: keys [B, Hkv, T, D].
            v: values [B, Hkv, T, M].
            key_mask: bool [B, T], True where a token is real: sequences of different lengths are padded on either side.

        Raises:
            StateError: another batch, head or dtype than at the first call, or more tokens than the capacity.
            The errors of the kernel's own function.
        """
        self._check(q, k, v, key_mask)
        if self.seen is None:
            out = self._first(q, k, v, key_mask)
            self.sizes = self._sizes_of(q, k, v)
            self.seen = torch.zeros(k.shape[0], dtype=torch.int64, device=k.device)
        else:
            out = self._next(q, k, v, key_mask)
        self.seen += k.shape[2] if key_mask is None else key_mask.sum(1)
        return out

    def reorder(self, index: Tensor) -> None:
        """Let sequence b go on from what is held for sequence index[b]: beams that were kept, dropped or doubled.

        Args:
            index: int64 [B'], each in 0 ... B - 1. B' may differ from B unless shapes are fixed.

        Raises:
            StateError: nothing is held yet, an index out of range, or another B' with fixed shapes.
        """
        if self.seen is None:
            raise refusal(
                StateError,
                "reorder was called before the first tokens",
                given="an empty cache",
                accepted="one that holds tokens",
            )
        B = self.seen.shape[0]
        inside = index.dim() == 1 and index.dtype == torch.int64 and index.numel() > 0
        if not inside or int(index.min()) < 0 or int(index.max()) >= B:
            given = f"{index.dtype}, {index.tolist()}"
            raise refusal(
                StateError,
                "reorder takes sequences of the batch",
                given=given,
                accepted=f"int64 numbers from 0 to {B - 1}",
            )
        if self.capacity is not None and index.shape[0] != B:
            raise refusal(
                StateError,
                "with fixed shapes reorder cannot change the batch size",
                given=f"{index.shape[0]} numbers",
                accepted=f"{B} numbers",
            )
        for holder, name, held in self._held():
            chosen = held.index_select(0, index.to(held.device))
            if self.capacity is not None:
                held.copy_(chosen)
            else:
                setattr(holder, name, chosen)
        self.sizes = (index.shape[0], *self.sizes[1:])

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return sum(held.nbytes for _, _, held in self._held())

    def _held(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Every tensor held, the batch first, and where; of this cache and of those inside it."""
        return [(holder, name, x) for holder in self.modules() for name, x in holder._buffers.items() if x is not None]

    def _check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        if not q.dim() == k.dim() == v.dim() == 4:
            given = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            accepted = "[B, H, T, D], [B, Hkv, T, D] and [B, Hkv, T, M]"
            raise refusal(ShapeError, "q, k and v must have four dimensions", given=given, accepted=accepted)
        if self.sizes and self.sizes != self._sizes_of(q, k, v):
            raise refusal(
                StateError,
                f"the cache holds (B, H, Hkv, D, M, dtype) = {self.sizes}",
                given=self._sizes_of(q, k, v),
                accepted="the same, or a new cache",
            )
        if key_mask is not None and key_mask.shape != (k.shape[0], k.shape[2]):
            accepted = f"[B, T] = {(k.shape[0], k.shape[2])}"
            raise refusal(ShapeError, "key_mask must fit the keys", given=tuple(key_mask.shape), accepted=accepted)

    @staticmethod
    def _sizes_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        return (*q.shape[:2], k.shape[1], k.shape[3], v.shape[3], k.dtype)

    @abstractmethod
    def _first(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """The first tokens: attend and hold."""

    @abstractmethod
    def _next(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """More tokens: attend to what is held as well."""

    # ---- saving ----

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a state dict holds beside tensors: kernel, capacity, sizes."""
        return {"kernel": self.kernel, "capacity": self.capacity, "sizes": list(self.sizes)}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Take over tensors of whatever shape were saved: a fresh cache has none."""
        kept = state_dict.get(prefix + EXTRA_STATE)
        mine = {"kernel": self.kernel, "capacity": self.capacity}
        if not isinstance(kept, dict) or any(kept.get(name) != value for name, value in mine.items()):
            raise refusal(
                StateError, "what is loaded was not saved from such a cache", given=kept, accepted=f"a cache of {mine}"
            )
        self.sizes = tuple(kept["sizes"])
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            setattr(self, name, None if saved is None else saved.clone())


class StateCache(DecodeCache):
    """Sums over the keys (linattn.states), of a feature map or of a quadratic kernel."""

    def __init__(
        self,
        kernel: str,
        attend: Callable[..., Any],
        capacity: int | None,
        kind: type[FeatureMapState] | type[QuadraticState] = FeatureMapState,
    ) -> None:
        super().__init__(kernel, attend, capacity)
        self.kind = kind
        for name in kind._fields:
            self.register_buffer(name, None)

    @property
    def state(self) -> FeatureMapState | QuadraticState | None:
        """Return the state or the keys and values, None before the first call."""
        return None if self.n is None else self.kind(*(getattr(self, name) for name in self.kind._fields))

    def hold(self, state: FeatureMapState | QuadraticState) -> None:
        """Hold this state instead; with fixed shapes in the same memory."""
        for name, x in zip(self.kind._fields, state, strict=True):
            if self.capacity is not None and getattr(self, name) is not None:
                getattr(self, name).copy_(x)
            else:
                setattr(self, name, x)

    def _first(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return self._hold_and_give(self.attend(q, k, v, is_causal=True, key_mask=key_mask, return_state=True))

    def _next(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        before = {"initial_state": self.state, "return_state": True}
        return self._hold_and_give(self.attend(q, k, v, is_causal=True, key_mask=key_mask, **before))

    def _hold_and_give(self, found: tuple[Tensor, FeatureMapState | QuadraticState]) -> Tensor:
        out, state = found
        self.hold(state)
        return out


class _Keys(DecodeCache):
    """Hold keys and values in buffers, or the state that may take their place: the base of two caches."""

    k: Tensor | None
    v: Tensor | None

    def __init__(self, kernel: str, attend: Callable[..., Any], capacity: int | None, fold_at: int | None) -> None:
        super().__init__(kernel, attend, capacity)
        self.register_buffer("k", None)
        self.register_buffer("v", None)
        self.fold_at = fold_at
        self.sums: StateCache | None = None
        if kernel in POLYNOMIAL:
            chunked = functools.partial(attend, form="chunked")
            self.sums = StateCache(kernel, chunked, capacity, QuadraticState)
            self.attend = functools.partial(attend, form="direct")

    def _folds_from(self, k: Tensor, v: Tensor) -> float:
        """Number of keys from which the state is the cheaper one."""
        if self.sums is None:
            return math.inf
        return self.fold_at or cost.fold_length(k.shape[3], v.shape[3], itemsize=k.itemsize)


class KeyCache(_Keys):
    """Keys and values in buffers that double when they are full; of a quadratic kernel, until they are folded."""

    mask: Tensor | None

    def __init__(self, kernel: str, attend: Callable[..., Any], capacity: int | None, fold_at: int | None) -> None:
        super().__init__(kernel, attend, capacity, fold_at)
        self.register_buffer("mask", None)
        self.length = 0

    def _first(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out: Tensor
        if self.sums is not None and k.shape[2] >= self._folds_from(k, v):
            out = self.sums(q, k, v, key_mask=key_mask)
        else:
            out = self.attend(q, k, v, is_causal=True, key_mask=key_mask)
            self._append(k, v, key_mask)
        return out

    def _next(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out: Tensor
        if self.sums is not None and self.sums.seen is not None:
            out = self.sums(q, k, v, key_mask=key_mask)
            return out
        past, T = self.length, k.shape[2]
        keys, values, mask = self._append(k, v, key_mask)
        # One query sees every key, which fast kernels need not be told; several see each other in order.
        order = {} if T == 1 else {"is_causal": True, "q_offset": past}
        if past + T < self._folds_from(k, v):
            out = self.attend(q, keys, values, key_mask=mask, **order)
            return out
        assert self.sums is not None
        out, state = self.attend(q, keys, values, key_mask=mask, return_state=True, **order)
        self.sums.hold(state)
        self.sums.seen = state.n.clone()
        self.k = self.v = self.mask = None
        self.length = 0
        return out

    def _append(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store these and return all: views of the buffers, and the mask if any token is padding."""
        past, total = self.length, self.length + k.shape[2]
        if key_mask is not None and self.mask is None:
            self.mask = torch.ones(k.shape[0], past, dtype=torch.bool, device=k.device)
        if self.mask is not None:
            real = key_mask if key_mask is not None else self.mask.new_ones(k.shape[0], k.shape[2])
            self.mask = torch.cat((self.mask, real), dim=1)
        if self.k is None or self.v is None or total > self.k.shape[2]:
            room = max(SHORTEST_BUFFER, 2 * past, total)
            before = (self.k, self.v)
            self.k, self.v = (x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (k, v))
            for old, new in zip(before, (self.k, self.v), strict=True):
                if old is not None:
                    new[:, :, :past] = old[:, :, :past]
        self.k[:, :, past:total], self.v[:, :, past:total] = k, v
        self.length = total
        return self.k[:, :, :total], self.v[:, :, :total], self.mask

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("k", "v"):
            if prefix + name in destination:  # without the spare room
                destination[prefix + name] = destination[prefix + name][:, :, : self.length].clone()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.length = 0 if self.k is None else self.k.shape[2]


class FixedKeyCache(_Keys):
    """Keys and values in as many slots as there may ever be tokens; or, where the state is the cheaper one at full
    capacity, the state beside the first 16 keys.

    The tokens of a sequence lie in its first slots, whatever side it was padded on. Tokens after the first call are
    taken one by one.
    """

    capacity: int

    def _first(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        self._check_room(k.shape[2] if key_mask is None else int(key_mask.sum(1).max()))
        through_sums = self.capacity > self._folds_from(k, v)
        slots = min(DIRECT_KEYS, self.capacity) if through_sums else self.capacity
        if through_sums:
            assert self.sums is not None
            out: Tensor = self.sums(q, k, v, key_mask=key_mask)
        else:
            out = self.attend(q, k, v, is_causal=True, key_mask=key_mask)
        if key_mask is not None:
            order = (~key_mask).to(torch.int8).argsort(dim=1, stable=True)[:, None, :, None]
            k, v = (x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v))
        self.k, self.v = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (k, v))
        kept = min(slots, k.shape[2])
        self.k[:, :, :kept], self.v[:, :, :kept] = k[:, :, :kept], v[:, :, :kept]
        return out

    def _next(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        assert self.seen is not None
        T, seen, outputs = k.shape[2], self.seen, []
        if not torch.compiler.is_compiling() and k.device.type == "cpu":  # elsewhere looking would mean waiting
            self._check_room(int(seen.max()) + T)
        for t in range(T):
            real = None if key_mask is None else key_mask[:, t : t + 1]
            after = seen + (1 if real is None else real.sum(1))
            q_t, k_t, v_t = (x[:, :, t : t + 1] for x in (q, k, v))
            outputs.append(self._one(q_t, k_t, v_t, real, seen, after))
            seen = after
        return outputs[0] if T == 1 else torch.cat(outputs, dim=2)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, seen: Tensor, after: Tensor) -> Tensor:
        assert self.k is not None
        assert self.v is not None
        slots = self.k.shape[2]
        place = seen.clamp(max=slots - 1)[:, None, None, None]
        for held, new in ((self.k, k), (self.v, v)):
            held.scatter_(2, place.expand_as(new), new)
        filled = torch.arange(slots, device=k.device) < after[:, None]
        out: Tensor = self.attend(q, self.k, self.v, key_mask=filled)
        if self.sums is None or self.sums.seen is None:
            return out
        through_sums = self.sums(q, k, v, key_mask=key_mask)
        return torch.where((after <= slots)[:, None, None, None], out, through_sums)

    def _check_room(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise refusal(
                StateError,
                "more tokens than the cache has room for",
                given=f"{tokens} tokens",
                accepted=f"at most capacity={self.capacity}",
            )


class ModelCache(nn.ModuleList):
    """The caches of all layers of a model, in order; `Transformer.decode_cache` and `CausalLM.decode_cache` make it."""

    @property
    def layers(self) -> list[DecodeCache]:
        """In order."""
        return cast("list[DecodeCache]", list(self))

    def reorder(self, index: Tensor) -> None:
        """See `DecodeCache.reorder`."""
        for layer in self.layers:
            layer.reorder(index)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self.layers)
