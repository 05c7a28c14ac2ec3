"""Every validation of the public functions and its message. Nothing runs before these pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linattn.errors import ArgumentError, DeviceError, DtypeError, ShapeError, StateError, unknown_name
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
        raise ArgumentError(f"{name} must be True or False; given: {value!r}")


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a tensor; given: {type(x).__name__}")
        if x.dtype not in DTYPES or x.layout != torch.strided:
            accepted = ", ".join(map(str, DTYPES))
            raise DtypeError(f"{name} must be a dense tensor of {accepted}; given: {x.dtype}, {x.layout}")
    if not q.device == k.device == v.device:
        raise DeviceError(f"q, k and v must be on one device; given: q {q.device}, k {k.device}, v {v.device}")
    device = q.device.type
    if autocasts(device) and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(
            "q, k and v must have one dtype (autocast gives them one, except to float64); given: "
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    return q, k, v


def autocasts(device: str) -> bool:
    """Whether calls on this kind of device are autocast now; "meta", for one, knows no autocast."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    problem = _shape_problem(q.shape, k.shape, v.shape, enable_gqa)
    if problem:
        raise ShapeError(f"{problem}; given: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


def _shape_problem(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> str:
    if not len(q) == len(k) == len(v) == 4:
        return "q must be [B, H, T, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, M]"
    if 0 in q or 0 in k or 0 in v:
        return "every size must be at least 1"
    if not q[0] == k[0] == v[0]:
        return "q, k and v must have the same batch size B"
    if q[3] != k[3]:
        return "q and k must have the same head size D"
    if k[2] != v[2]:
        return "k and v must have the same length Tk"
    if k[1] != v[1]:
        return "k and v must have the same number of heads Hkv"
    if enable_gqa and q[1] % k[1] != 0:
        return "with enable_gqa=True the heads of q must be a multiple of those of k and v"
    if not enable_gqa and q[1] != k[1]:
        return "q, k and v must have the same number of heads, or set enable_gqa=True"
    return ""


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        given = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise DtypeError(f"key_mask must be a bool tensor, True for keys that count; given: {given}")
    if key_mask.shape != expected:
        raise ShapeError(f"key_mask must be [B, Tk] = {tuple(expected)}; given: {tuple(key_mask.shape)}")
    if key_mask.device != k.device:
        raise DeviceError(f"key_mask must be on {k.device} like k; given: {key_mask.device}")


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Its values are checked inside the op, before any kernel: `kernels.common.op.varlen`."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise DtypeError(f"cu_seqlens must be an int32 or int64 tensor; given: {given}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ShapeError(
            f"cu_seqlens must be [sequences + 1] with at least one sequence; given: {tuple(cu_seqlens.shape)}"
        )
    if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ShapeError(
            "with cu_seqlens, q, k and v hold one packed row: B = 1 and T = Tk; given: "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if cu_seqlens.device != q.device:
        raise DeviceError(f"cu_seqlens must be on {q.device} like q; given: {cu_seqlens.device}")


def check_offset(is_causal: bool, q_offset: int | None, T: int, Tk: int) -> int:
    """The causal alignment: query i sees keys up to i + q_offset."""
    if q_offset is None:
        if is_causal and Tk != T:
            raise ArgumentError(
                "is_causal=True with T != Tk needs q_offset (query i sees keys <= i + q_offset); given: "
                f"T={T}, Tk={Tk}. q_offset={Tk - T} aligns the last query with the last key"
            )
        return 0
    if not isinstance(q_offset, int | torch.SymInt) or isinstance(q_offset, bool) or not abs(q_offset) < 2**62:
        raise ArgumentError(f"q_offset must be an int below 2^62; given: {q_offset!r}")
    if not is_causal and q_offset != 0:
        raise ArgumentError(
            f"q_offset has a meaning only with is_causal=True; given: q_offset={q_offset}, is_causal=False"
        )
    return q_offset


def check_scale(scale: float) -> float:
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < math.inf:  # NaN fails too
        raise ArgumentError(f"scale must be a finite int or float; given: {scale!r}")
    return float(scale)


def check_coefficients(coefficients: Sequence[float], normalize: bool) -> tuple[float, float, float]:
    """c0, c1, c2 of sim = c0 + c1 s + c2 s^2 = c2 (s + b)^2 + r, which is non-negative when c2 > 0 and r >= 0."""
    three = isinstance(coefficients, Sequence) and len(coefficients) == 3
    if not three or not all(isinstance(c, int | float) and abs(c) < math.inf for c in coefficients):
        raise ArgumentError(f"coefficients must be three finite numbers (c0, c1, c2); given: {coefficients!r}")
    c0, c1, c2 = (float(c) for c in coefficients)
    if c2 == 0:
        raise ArgumentError(
            f"coefficients with c2 = 0 are not a quadratic kernel; given: {tuple(coefficients)}. "
            "linear_attention computes similarities of degree 1"
        )
    _, r = complete_square((c0, c1, c2))
    if normalize and (c2 < 0 or r < 0):
        raise ArgumentError(
            f"normalize=True needs a similarity that is never negative: c2 > 0 and c0 >= c1^2 / (4 c2); given: "
            f"{tuple(coefficients)}, smallest value {r if c2 > 0 else -math.inf:g}. normalize=False accepts any c2 != 0"
        )
    return c0, c1, c2


def check_form(form: Form, is_causal: bool) -> None:
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if form == "recurrent" and not is_causal:
        raise ArgumentError("form='recurrent' reads keys one by one and needs is_causal=True; given: is_causal=False")


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
        raise StateError(f"initial_state must be a {kind.__name__}; given: {type(state).__name__}")
    for name, x, shape in zip(kind._fields, state, shapes, strict=True):  # type: ignore[attr-defined]
        expected = torch.int64 if name == "n" else dtype
        if not isinstance(x, Tensor):
            raise StateError(f"initial_state.{name} must be a tensor; given: {x!r}")
        if tuple(x.shape) != tuple(shape):
            raise StateError(f"initial_state.{name} must be {tuple(shape)} for these inputs; given: {tuple(x.shape)}")
        if x.dtype != expected:
            raise StateError(f"initial_state.{name} must be {expected} for these inputs; given: {x.dtype}")
        if x.device != device:
            raise StateError(f"initial_state.{name} must be on {device} like q; given: {x.device}")
    return tuple(state)
