"""Every validation of the public functions and its message. Nothing runs before these pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linattn.errors import ArgumentError, DeviceError, DtypeError, ShapeError, StateError, refusal, unknown_name
from linattn.kernels.common.op.conditioning import complete_square

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Form = Literal["auto", "direct", "chunked", "recurrent"]
FORMS: tuple[Form, ...] = ("auto", "direct", "chunked", "recurrent")


class Inputs(NamedTuple):
    """Tensors and options that every operation shares, once they have passed."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None
    is_causal: bool
    q_offset: int
    device: str

    @property
    def sequences(self) -> int:
        """Number of states: packed sequences, or the batch size."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    q_offset: int | None = None,
    enable_gqa: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Inputs:
    """Check q `[B, H, T, D]`, k `[B, Hkv, Tk, D]`, v `[B, Hkv, Tk, M]` and how they meet; apply autocast."""
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    q, k, v = check_dtypes(q, k, v)
    check_shapes(q, k, v, enable_gqa)
    check_key_mask(key_mask, k)
    check_cu_seqlens(cu_seqlens, q, k)
    q_offset = check_offset(is_causal, q_offset, q.shape[2], k.shape[2])
    return Inputs(q, k, v, key_mask, cu_seqlens, is_causal, q_offset, q.device.type)


def check_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise refusal(ArgumentError, f"{name} is not a bool", given=repr(value), accepted="True or False")


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise refusal(DtypeError, f"{name} must be a tensor", given=type(x).__name__, accepted="torch.Tensor")
        if x.dtype not in DTYPES or x.layout != torch.strided:
            accepted = ", ".join(map(str, DTYPES))
            raise refusal(
                DtypeError,
                f"{name} must be a dense tensor of floats",
                given=f"{x.dtype}, {x.layout}",
                accepted=accepted,
            )
    if not q.device == k.device == v.device:
        raise refusal(
            DeviceError,
            "q, k and v must be on one device",
            given=f"q {q.device}, k {k.device}, v {v.device}",
            accepted=f"all on {q.device}",
        )
    device = q.device.type
    if autocasts(device) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise refusal(
            DtypeError,
            "q, k and v must have one dtype",
            given=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            accepted="one dtype, or a call under autocast, which gives them one (except to float64)",
        )
    return q, k, v


def autocasts(device: str) -> bool:
    """Whether calls on this kind of device are autocast now; "meta", for one, knows no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    """Raise ShapeError unless q, k and v fit each other."""
    accepted = _accepted_shapes(q.shape, k.shape, v.shape, enable_gqa)
    if accepted:
        given = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise refusal(ShapeError, "q, k and v do not fit each other", given=given, accepted=accepted)


def _accepted_shapes(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> str:
    """Return the rule that the shapes break, or ""."""
    if not len(q) == len(k) == len(v) == 4:
        return "q [B, H, T, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, M]"
    if 0 in q or 0 in k or 0 in v:
        return "every size at least 1"
    if not q[0] == k[0] == v[0]:
        return "the same batch size B for q, k and v"
    if q[3] != k[3]:
        return "the same head size D for q and k"
    if k[2] != v[2]:
        return "the same length Tk for k and v"
    if k[1] != v[1]:
        return "the same number of heads Hkv for k and v"
    if enable_gqa and q[1] % k[1] != 0:
        return "with enable_gqa=True, heads of q that are a multiple of those of k and v"
    if not enable_gqa and q[1] != k[1]:
        return "the same number of heads for q, k and v, or enable_gqa=True"
    return ""


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        given = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise refusal(
            DtypeError, "key_mask has no truth values", given=given, accepted="a bool tensor, True for keys that count"
        )
    if key_mask.shape != expected:
        raise refusal(
            ShapeError,
            "key_mask must fit the keys",
            given=tuple(key_mask.shape),
            accepted=f"[B, Tk] = {tuple(expected)}",
        )
    if key_mask.device != k.device:
        raise refusal(DeviceError, "key_mask must be where k is", given=key_mask.device, accepted=k.device)


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Its values are checked inside the op, before any kernel: `kernels.common.op.varlen`."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise refusal(DtypeError, "cu_seqlens must be integers", given=given, accepted="an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise refusal(
            ShapeError,
            "cu_seqlens must bound the sequences",
            given=tuple(cu_seqlens.shape),
            accepted="[sequences + 1] with at least one sequence",
        )
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise refusal(
            ShapeError,
            "with cu_seqlens, q, k and v hold one packed row",
            given=f"q {tuple(q.shape)}, k {tuple(k.shape)}",
            accepted="B = 1 and T = Tk",
        )
    if cu_seqlens.device != q.device:
        raise refusal(DeviceError, "cu_seqlens must be where q is", given=cu_seqlens.device, accepted=q.device)


def check_offset(is_causal: bool, q_offset: int | None, T: int, Tk: int) -> int:
    """The causal alignment: query i sees keys up to i + q_offset."""
    if q_offset is None:
        if is_causal and Tk != T:
            raise refusal(
                ArgumentError,
                "is_causal=True with T != Tk needs q_offset (query i sees keys <= i + q_offset)",
                given=f"T={T}, Tk={Tk}",
                accepted=f"an int; q_offset={Tk - T} aligns the last query with the last key",
            )
        return 0
    if not isinstance(q_offset, int | torch.SymInt) or isinstance(q_offset, bool) or not abs(q_offset) < 2**62:
        raise refusal(ArgumentError, "q_offset is no position", given=repr(q_offset), accepted="an int below 2^62")
    if not is_causal and q_offset != 0:
        raise refusal(
            ArgumentError,
            "q_offset has a meaning only with is_causal=True",
            given=f"q_offset={q_offset}, is_causal=False",
            accepted="is_causal=True, or no q_offset",
        )
    return q_offset


def check_scale(scale: float) -> float:
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < math.inf:  # NaN fails too
        raise refusal(
            ArgumentError, "scale is not a finite number", given=repr(scale), accepted="a finite int or float"
        )
    return float(scale)


def check_coefficients(coefficients: Sequence[float], normalize: bool) -> tuple[float, float, float]:
    """c0, c1, c2 of sim = c0 + c1 s + c2 s^2 = c2 (s + b)^2 + r, which is non-negative when c2 > 0 and r >= 0."""
    three = isinstance(coefficients, Sequence) and len(coefficients) == 3
    if not three or not all(isinstance(c, int | float) and abs(c) < math.inf for c in coefficients):
        raise refusal(
            ArgumentError,
            "coefficients are those of a polynomial of degree 2",
            given=repr(coefficients),
            accepted="three finite numbers (c0, c1, c2)",
        )
    c0, c1, c2 = (float(c) for c in coefficients)
    if c2 == 0:
        raise refusal(
            ArgumentError,
            "coefficients with c2 = 0 are not a quadratic kernel",
            given=tuple(coefficients),
            accepted="c2 != 0; linear_attention computes similarities of degree 1",
        )
    _, r = complete_square((c0, c1, c2))
    if normalize and (c2 < 0 or r < 0):
        raise refusal(
            ArgumentError,
            "normalize=True needs a similarity that is never negative",
            given=f"{tuple(coefficients)}, smallest value {r if c2 > 0 else -math.inf:g}",
            accepted="c2 > 0 and c0 >= c1^2 / (4 c2), or with normalize=False any c2 != 0",
        )
    return c0, c1, c2


def check_form(form: Form, is_causal: bool) -> None:
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if form == "recurrent" and not is_causal:
        raise refusal(
            ArgumentError, "form='recurrent' takes keys in order", given="is_causal=False", accepted="is_causal=True"
        )


def check_state(
    state: Sequence[Tensor] | None,
    kind: type,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The tensors of an initial state, or none."""
    if state is None:
        return ()
    if not isinstance(state, kind):
        raise refusal(
            StateError, "initial_state is of another kind", given=type(state).__name__, accepted=kind.__name__
        )
    for name, x, shape in zip(kind._fields, state, shapes, strict=True):  # type: ignore[attr-defined]
        expected = torch.int64 if name == "n" else dtype
        if not isinstance(x, Tensor):
            raise refusal(StateError, f"initial_state.{name} must be a tensor", given=repr(x), accepted="torch.Tensor")
        if tuple(x.shape) != tuple(shape):
            raise refusal(
                StateError, f"initial_state.{name} must fit these inputs", given=tuple(x.shape), accepted=tuple(shape)
            )
        if x.dtype != expected:
            raise refusal(StateError, f"initial_state.{name} must fit these inputs", given=x.dtype, accepted=expected)
        if x.device != device:
            raise refusal(StateError, f"initial_state.{name} must be where q is", given=x.device, accepted=device)
    return tuple(state)
