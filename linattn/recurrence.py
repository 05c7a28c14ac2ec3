"""The loop over time of a recurrent layer, behind the projection of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from linattn._dispatch import plan
from linattn._dispatch.checks import autocasts
from linattn.errors import ArgumentError, BackendError, DeviceError, DtypeError, ShapeError, StateError, unknown_name
from linattn.kernels.common.op.backend import BackendQuery
from linattn.kernels.recurrent import autograd, reference
from linattn.kernels.recurrent.contract import CELLS, gates
from linattn.kernels.recurrent.ops import BACKENDS

State = tuple[Tensor, ...]
Activation = Callable[[Tensor], Tensor]


def recur(
    projected: Tensor,
    weight_h: Tensor,
    initial: State | None = None,
    *,
    cell: str | Activation = "tanh",
    lengths: Tensor | None = None,
    kept: list[State] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """Walk through time: `z_t = p_t + W h_{t-1}`, with p the inputs that one product has projected already.

        "tanh", "relu", "identity", a function:  h_t = act(z_t)
        "lstm":  i, f, g, o = z_t    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)    h_t = sigmoid(o) tanh(c_t)

    Args:
        projected: p `[B, T, G H]`, T >= 1; G is 4 for "lstm", its gates in the order i, f, g, o, else 1.
        weight_h: W `[G H, H]`.
        initial: (h_0,), or (h_0, c_0) for "lstm", `[B, H]` each; zeros by default.
        cell: a name, or the activation of an Elman cell as a function that keeps the shape.
        lengths: int64 `[B]`, each 1 to T: the steps of each sequence. Its state stays as it is from there on, its h are
            0, and what `projected` holds there is ignored.
        kept: a list to which every state is appended with its gradient retained; taken step by step by the reference.
        backend: "native" (C++, fp32 on the CPU, a first derivative), "triton" (a product and a fused kernel a step, on
            a GPU, a first derivative), "reference" (plain PyTorch, everything), or "auto", the first that can.

    Returns: all h `[B, T, H]` and the last state.

    Cost: 2 B T G H^2 flops forward, twice that backward, one step after another. Memory O(B T H); for the backward pass
    of an LSTM the fused backends keep five numbers a unit and step, and of an Elman cell nothing but h.

    Raises: ShapeError, DtypeError, DeviceError, ArgumentError (cell, lengths), StateError, BackendError (a named
    backend cannot run this); DoubleBackwardError for a second derivative on a fused one.

    >>> all_h, (h, c) = recur(torch.randn(2, 5, 12), torch.randn(12, 3), cell="lstm")
    >>> all_h.shape, torch.equal(all_h[:, -1], h)
    (torch.Size([2, 5, 3]), True)
    """
    _check_call(projected, weight_h, cell, lengths)
    H = weight_h.shape[1]
    count = 2 if cell == "lstm" else 1
    if initial is None:
        initial = tuple(projected.new_zeros(projected.shape[0], H) for _ in range(count))
    else:
        _check_states(initial, count, (projected.shape[0], H), projected)
    lengths = None if lengths is None else lengths.to(projected.device)
    chosen = _backend(backend, projected, weight_h, initial, cell, kept)
    if chosen == "reference":
        return reference.recur(projected, weight_h, initial, lengths, cell, kept)
    assert isinstance(cell, str)
    return autograd.recur(projected, weight_h, initial, lengths, cell, chosen)


def _backend(
    backend: str, projected: Tensor, weight_h: Tensor, initial: State, cell: str | Activation, kept: list[State] | None
) -> str:
    asked = plan.named_backend(backend)
    if asked != "auto" and asked not in BACKENDS:
        raise unknown_name("backend of a recurrence", asked, ("auto", *BACKENDS), BackendError)
    mixed = {projected.dtype, weight_h.dtype, *(x.dtype for x in initial)}
    for name, backend_of in BACKENDS.items():
        query = BackendQuery(projected.device.type, projected.dtype, 1, 1, "recurrent", named=asked != "auto")
        refused = backend_of.refusal(query)
        if name != "reference":
            if not isinstance(cell, str):
                refused = refused or "the cell is a function, which only the reference can call"
            if kept is not None:
                refused = refused or "states are kept with their gradients, one step after another"
            if len(mixed) > 1:
                refused = refused or f"mixed dtypes under autocast, {', '.join(sorted(map(str, mixed)))}"
        if asked == name and refused:
            raise BackendError(f"backend {name!r} cannot run this recurrence: {refused}; backend='auto' can")
        if asked in (name, "auto") and not refused:
            return name
    raise AssertionError("the reference runs everything")


def _check_call(projected: Tensor, weight_h: Tensor, cell: str | Activation, lengths: Tensor | None) -> None:
    if not isinstance(cell, str) and not callable(cell):
        raise ArgumentError(f"cell must be a name or a function of a tensor, got {cell!r}")
    if isinstance(cell, str) and cell not in CELLS:
        raise unknown_name("cell", cell, CELLS)
    G = gates(cell) if isinstance(cell, str) else 1
    if weight_h.dim() != 2 or weight_h.shape[0] != G * weight_h.shape[1] or weight_h.numel() == 0:
        raise ShapeError(f"weight_h must have shape [{'4 H' if G == 4 else 'H'}, H], got {list(weight_h.shape)}")
    if projected.dim() != 3 or projected.shape[1] == 0 or projected.shape[2] != weight_h.shape[0]:
        raise ShapeError(f"projected must have shape [B, T >= 1, {weight_h.shape[0]}], got {list(projected.shape)}")
    check_like("weight_h", weight_h, projected)
    if lengths is not None:
        check_lengths(lengths, projected.shape[0], projected.shape[1])


def check_lengths(lengths: object, B: int, T: int) -> Tensor:
    """Return `lengths` if it is an int64 tensor `[B]` with values from 1 to T."""
    accepted = f"accepted: an int64 tensor [{B}] of values from 1 to {T}"
    if not isinstance(lengths, Tensor):
        raise ArgumentError(f"lengths are a {type(lengths).__name__}; {accepted}")
    if lengths.dtype != torch.int64 or list(lengths.shape) != [B]:
        raise ArgumentError(f"lengths have dtype {lengths.dtype} and shape {list(lengths.shape)}; {accepted}")
    if B > 0 and not (lengths.min() >= 1 and lengths.max() <= T):
        raise ArgumentError(f"lengths reach from {int(lengths.min())} to {int(lengths.max())}; {accepted}")
    return lengths


def _check_states(initial: object, count: int, shape: tuple[int, int], projected: Tensor) -> None:
    names = ("h", "c")[:count]
    if not isinstance(initial, tuple) or len(initial) != count:
        given = f"{len(initial)} tensors" if isinstance(initial, tuple) else type(initial).__name__
        raise StateError(f"initial must be a tuple ({', '.join(names)}), got {given}")
    for name, tensor in zip(names, initial, strict=True):
        check_state(f"initial {name}", tensor, shape, projected)


def check_state(name: str, state: object, shape: Sequence[int], x: Tensor) -> Tensor:
    """Return `state` if it is a tensor of exactly this shape, with the dtype and device of the inputs `x`."""
    if not isinstance(state, Tensor):
        raise StateError(f"{name} must be a torch.Tensor of shape {list(shape)}, got {type(state).__name__}")
    if list(state.shape) != list(shape):
        raise StateError(f"{name} must have shape {list(shape)} for these inputs, got {list(state.shape)}")
    check_like(name, state, x)
    return state


def check_like(name: str, given: Tensor, like: Tensor) -> None:
    """Raise DeviceError or DtypeError unless both are on one device and, outside autocast, of one dtype."""
    if given.device != like.device:
        raise DeviceError(f"{name} is on {given.device}, but this call runs on {like.device}")
    # Autocast casts both sides of every product itself.
    if given.dtype != like.dtype and not autocasts(given.device.type):
        raise DtypeError(f"{name} has dtype {given.dtype}, expected {like.dtype}; only autocast accepts mixed dtypes")
