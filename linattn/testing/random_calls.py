"""Random calls of the public operations, each drawn from a seed: every option, layout and odd size that they promise.

>>> from linattn.testing.random_calls import EXTENTS, draw
>>> draw("quadratic", 7, EXTENTS["small"]) == draw("quadratic", 7, EXTENTS["small"])
True
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import linattn
from linattn.errors import unknown_name
from linattn.kernels.common.op.allocation import accumulation_dtype
from linattn.states import FeatureMapState, QuadraticState
from linattn.testing import (
    LAYOUTS,
    make_inputs,
    make_key_mask,
    truth_feature_state,
    truth_linear,
    truth_quadratic,
    truth_quadratic_state,
    truth_softmax,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from linattn.feature_maps import FeatureMap

OPS = ("quadratic", "feature_map", "softmax")
COEFFICIENTS = ((1.0, 2.0, 1.0), (1.0, 1.0, 0.5), (0.0, 0.0, 1.0), (3.0, -1.0, 0.25))
SIGNED_COEFFICIENTS = ((-1.0, 0.5, 2.0), (0.3, 0.0, -1.0))
"""Only without normalisation: these similarities may be negative."""
CALLABLE = "a callable"
FEATURE_MAPS = ("elu+1", "relu", "relu2", "exp", CALLABLE)
EDGES = (16, 32, 64, 128, 256, 512, 1024)
"""Where tiles end: lengths and sizes are often drawn at, just below or just above one of these."""


@dataclass(frozen=True)
class Extent:
    """How large a call may become: longest sequence, largest head size, most heads times batch."""

    length: int
    head: int
    heads: int


EXTENTS = {
    "tiny": Extent(40, 24, 3),
    "small": Extent(80, 48, 4),
    "medium": Extent(300, 128, 6),
    "large": Extent(1500, 256, 12),
}


@dataclass(frozen=True)
class RandomCall:
    """One call, without its numbers.

    Attributes:
        lengths: of the packed sequences, or ().
        past: keys in the initial state, None for no state.
        needs_grad: inputs whose gradients are computed, out of q, k, v and past.
    """

    op: str
    seed: int
    B: int
    H: int
    Hkv: int
    T: int
    Tk: int
    D: int
    M: int
    dtype: torch.dtype
    layout: str
    score_std: float
    is_causal: bool
    q_offset: int | None
    masked: bool
    dirty: bool
    lengths: tuple[int, ...]
    index_dtype: torch.dtype
    past: int | None
    return_state: bool
    form: str
    normalize: bool
    scale: float | None
    coefficients: tuple[float, float, float]
    feature_map: str
    needs_grad: tuple[str, ...]
    state_needs_grad: bool
    twice: bool

    def __str__(self) -> str:
        words = [f"{self.op} B{self.B} H{self.H}/{self.Hkv} T{self.T} Tk{self.Tk} D{self.D} M{self.M}", self.layout]
        words += [str(self.dtype).removeprefix("torch."), f"score_std {self.score_std}"]
        words += [f"causal, q_offset {self.q_offset}" if self.is_causal else "not causal"]
        words += [f"key_mask{' over NaN' if self.dirty else ''}"] if self.masked else []
        words += [f"cu_seqlens of lengths {self.lengths}"] if self.lengths else []
        if self.op != "softmax":
            words += [] if self.past is None else [f"initial state of {self.past} keys"]
            words += [f"form {self.form}", "normalized" if self.normalize else "not normalized"]
            words += [f"coefficients {self.coefficients}" if self.op == "quadratic" else self.feature_map]
            words += (
                [f"state returned{' and differentiated' if self.state_needs_grad else ''}"] if self.return_state else []
            )
        return ", ".join([*words, f"scale {self.scale}", f"gradients of {', '.join(self.needs_grad) or 'nothing'}"])

    @property
    def similarity(self) -> FeatureMap:
        """The feature map as the public function takes it."""
        return torch.abs if self.feature_map == CALLABLE else self.feature_map


def draw(op: str, seed: int, extent: Extent, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> RandomCall:
    """Draw the call of this seed: the same on every machine."""
    if op not in OPS:
        raise unknown_name("operation", op, OPS)
    r = random.Random(f"{op} {seed}")
    packed, masked, stateful = r.random() < 0.3, r.random() < 0.3, op != "softmax"
    B = 1 if packed else r.choice((1, 1, 2, 3))
    Hkv = r.randint(1, max(1, extent.heads // B // 2))
    H = Hkv * r.choice((1, 1, 2, 3))
    layout = r.choice((*LAYOUTS, "expanded"))
    T = _size(r, extent.length)
    Tk = T if packed or layout == "fused" or r.random() < 0.5 else _size(r, extent.length)
    form = r.choice(("direct", "chunked", "auto", "recurrent")) if stateful else "direct"
    if form == "recurrent" and T * B * H > 64:  # one step a token
        form = "chunked"
    is_causal = form == "recurrent" or r.random() < 0.6
    normalize = not stateful or r.random() < 0.75
    scale = r.choice((1.0, 1.0, 0.3, 2.0)) if stateful else r.choice((None, 1.0, 0.2, -0.7))
    if op == "quadratic" or not normalize:
        scale = scale if scale is None or r.random() < 0.8 else -scale
    past = r.choice((None, None, 0, 1, 20, 45)) if stateful else None
    return_state = stateful and r.random() < 0.4
    names = ("q", "k", "v", "past") if past else ("q", "k", "v")
    return RandomCall(
        op,
        seed,
        B,
        H,
        Hkv,
        T,
        Tk,
        D=_size(r, extent.head),
        M=_size(r, extent.head),
        dtype=r.choice(dtypes),
        layout=layout,
        score_std=r.choice((0.25, 0.25, 0.25, 0.05, 1.0)),
        is_causal=is_causal,
        q_offset=_offset(r, T, Tk) if is_causal else None,
        masked=masked,
        dirty=masked and layout != "expanded" and r.random() < 0.5,
        lengths=_lengths(r, T) if packed else (),
        index_dtype=r.choice((torch.int32, torch.int64)),
        past=past,
        return_state=return_state,
        form=form,
        normalize=normalize,
        scale=scale,
        coefficients=r.choice(COEFFICIENTS if normalize else COEFFICIENTS + SIGNED_COEFFICIENTS),
        feature_map=r.choice(FEATURE_MAPS if normalize else (*FEATURE_MAPS, "identity")),
        needs_grad=names if r.random() < 0.6 else tuple(name for name in names if r.random() < 0.5),
        state_needs_grad=return_state and r.random() < 0.7,
        twice=r.random() < 0.15,
    )


def _size(r: random.Random, largest: int) -> int:
    """Draw from 1 to largest: any size by its order of magnitude, and every third time near the edge of a tile."""
    edges = [edge for edge in EDGES if edge <= largest]
    if edges and r.random() < 0.35:
        return min(largest, r.choice(edges) + r.choice((-1, 0, 0, 1)))
    return round(math.exp(r.uniform(0, math.log(largest))))


def _offset(r: random.Random, T: int, Tk: int) -> int | None:
    if Tk == T and r.random() < 0.6:
        return None
    return r.choice((Tk - T, 0, 3, -2, r.randint(-T, Tk)))


def _lengths(r: random.Random, T: int) -> tuple[int, ...]:
    """Cut T into up to 5 sequences; some may be empty."""
    ends = sorted(r.randint(0, T) for _ in range(r.randint(0, 4)))
    return tuple(b - a for a, b in zip([0, *ends], [*ends, T], strict=True))


@dataclass(frozen=True)
class Arguments:
    """The numbers of a call: tensors, options of the public function, and where they are to be differentiated."""

    tensors: dict[str, Tensor]
    """q, k, v, and past_k [S,Hkv,P,D], past_v [S,Hkv,P,M] where there is an initial state of P > 0 keys."""
    key_mask: Tensor | None
    cu_seqlens: Tensor | None

    def visible(self) -> dict[str, Tensor]:
        """Return the tensors with zeros for masked keys, which may hold NaN."""
        if self.key_mask is None:
            return self.tensors
        hidden = ~self.key_mask[:, None, :, None]
        return {name: x.masked_fill(hidden, 0) if name in ("k", "v") else x for name, x in self.tensors.items()}


def make_arguments(call: RandomCall, device: torch.device | str) -> Arguments:
    """Draw the numbers of a call."""
    expanded = call.layout == "expanded"
    q, k, v = make_inputs(
        batch=call.B,
        heads=call.H,
        kv_heads=call.Hkv,
        queries=call.T,
        keys=call.Tk,
        head_size=call.D,
        value_size=call.M,
        score_std=call.score_std,
        layout="contiguous" if expanded else call.layout,  # type: ignore[arg-type]
        dtype=call.dtype,
        device=device,
        seed=call.seed,
    )
    if expanded:  # all key heads are one
        k, v = (x[:, :1].expand(-1, call.Hkv, -1, -1) for x in (k, v))
    tensors = {"q": q, "k": k, "v": v}
    if call.past:
        _, tensors["past_k"], tensors["past_v"] = make_inputs(
            batch=len(call.lengths) or call.B,
            heads=call.Hkv,
            keys=call.past,
            head_size=call.D,
            value_size=call.M,
            score_std=call.score_std,
            dtype=call.dtype,
            device=device,
            seed=call.seed + 1,
        )
    key_mask = make_key_mask(call.B, call.Tk, seed=call.seed).to(device) if call.masked else None
    if key_mask is not None and call.dirty:
        for name in ("k", "v"):  # in place: the layout is part of the call
            tensors[name].masked_fill_(~key_mask[:, None, :, None], math.nan)
    ends = [0, *accumulate(call.lengths)]
    cu_seqlens = torch.tensor(ends, dtype=call.index_dtype, device=device) if call.lengths else None
    return Arguments(tensors, key_mask, cu_seqlens)


def perform(call: RandomCall, backend: str, arguments: Arguments, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Call the public function: out, and the fields of the state if the call returns one, n first."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    options: dict[str, Any] = {
        "is_causal": call.is_causal,
        "q_offset": call.q_offset,
        "key_mask": arguments.key_mask,
        "cu_seqlens": arguments.cu_seqlens,
        "enable_gqa": call.Hkv != call.H,
        "scale": call.scale,
        "backend": backend,
    }
    if call.op == "softmax":
        return [linattn.softmax_attention(q, k, v, **options)]
    options |= {"normalize": call.normalize, "form": call.form, "return_state": call.return_state}
    options["initial_state"] = _initial_state(call, arguments, tensors)
    if call.op == "quadratic":
        result = linattn.quadratic_attention(q, k, v, coefficients=call.coefficients, **options)
    else:
        result = linattn.linear_attention(q, k, v, feature_map=call.similarity, **options)
    return [result[0], *result[1]] if call.return_state else [result]


def _initial_state(call: RandomCall, arguments: Arguments, tensors: dict[str, Tensor]) -> Any:
    """Compute the state after the past keys, in float64, then rounded; gradients pass through it to these keys."""
    if call.past is None:
        return None
    dtype = accumulation_dtype(call.dtype)
    kind = QuadraticState if call.op == "quadratic" else FeatureMapState
    if call.past == 0:
        sequences = len(call.lengths) or call.B
        return kind.empty(sequences, call.Hkv, call.D, call.M, dtype=dtype, device=tensors["q"].device)
    n, *sums = state_of(call)(tensors["past_k"], tensors["past_v"])
    return kind(n.to(tensors["q"].device), *(x.to(dtype) for x in sums))


def truth(call: RandomCall, arguments: Arguments, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Compute in float64 the results that `perform` has to return, from `tensors` without NaN."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    options: dict[str, Any] = {
        "is_causal": call.is_causal,
        "q_offset": call.q_offset,
        "key_mask": arguments.key_mask,
        "cu_seqlens": arguments.cu_seqlens,
        "scale": call.scale,
    }
    if call.op == "softmax":
        return [truth_softmax(q, k, v, **options)]
    past = (tensors["past_k"], tensors["past_v"]) if call.past else None
    options |= {"normalize": call.normalize, "past": past}
    if call.op == "quadratic":
        out = truth_quadratic(q, k, v, coefficients=call.coefficients, **options)
    else:
        out = truth_linear(q, k, v, feature_map=call.similarity, **options)
    if not call.return_state:
        return [out]
    state = state_of(call)(k, v, key_mask=arguments.key_mask, cu_seqlens=arguments.cu_seqlens)
    if past is not None:
        state = tuple(new + old for new, old in zip(state, state_of(call)(*past), strict=True))
    return [out, *state]


def state_of(call: RandomCall) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function of keys and values that gives their state in float64."""
    if call.op == "quadratic":
        return truth_quadratic_state
    return partial(truth_feature_state, feature_map=call.similarity)
