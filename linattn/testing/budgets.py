"""Error budgets, what an output and its gradients are compared by, and memory that is poisoned beforehand."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn.testing.truth import visible_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Let uninitialised memory hold NaN (integers: their smallest), so that an operation that forgets to write a place
    cannot pass by luck. Memory that compiled code allocates stays as it is.
    """
    names = {torch: ("empty", "empty_like", "empty_strided"), Tensor: ("new_empty", "new_empty_strided")}
    before = [(owner, name, getattr(owner, name)) for owner, some in names.items() for name in some]
    try:
        for owner, name, allocate in before:
            setattr(owner, name, _poisoned(allocate))
        yield
    finally:
        for owner, name, allocate in before:
            setattr(owner, name, allocate)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_poison(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return allocate_and_poison


@dataclass(frozen=True)
class Budget:
    """The largest accepted relative error, by norm of a whole tensor, on well-conditioned inputs."""

    forward: float
    gradient: float


BUDGETS: dict[torch.dtype, Budget] = {
    torch.float64: Budget(1e-12, 1e-11),
    torch.float32: Budget(1e-5, 5e-5),
    torch.bfloat16: Budget(3e-3, 1e-2),
    torch.float16: Budget(3e-3, 1e-2),
}


def relative_error(actual: Tensor, truth: Tensor, *, floor: float = 0.0) -> float:
    """Return `|actual - truth| / max(|truth|, floor)` by Euclidean norm, in float64; NaN where either holds NaN."""
    difference = float(torch.linalg.vector_norm(actual.double() - truth.double()))
    size = max(float(torch.linalg.vector_norm(truth.double())), floor)
    return difference / size if size > 0 else difference


def row_errors(actual: Tensor, truth: Tensor, v: Tensor) -> Tensor:
    """Return each query's error against the largest value: `|actual_i - truth_i| / max_j |v_j|`, [B,H,Tq]."""
    errors: Tensor = torch.linalg.vector_norm(actual.double() - truth.double(), dim=-1)
    sizes: Tensor = torch.linalg.vector_norm(v.double(), dim=-1)
    return errors / sizes.max()


def condition_number(
    q: Tensor,
    k: Tensor,
    *,
    scale: float = 1.0,
    coefficients: tuple[float, float, float] = (1, 2, 1),
    is_causal: bool = False,
    q_offset: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Compute `kappa_i = sum_j (|c0| + |c1| t_ij + |c2| t_ij^2) / l_i`, `t = |scale| |q|.|k|`, in float64: [B,H,Tq].

    The error of a row of quadratic attention is about eps * kappa. Infinite where l_i is 0.
    """
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    seen = visible_keys(
        q.shape[2], k.shape[2], is_causal=is_causal, q_offset=q_offset, key_mask=key_mask, device=q.device
    )
    c0, c1, c2 = coefficients
    s, t = scale * (q @ k.mT), abs(scale) * (q.abs() @ k.abs().mT)
    total = torch.where(seen, c0 + c1 * s + c2 * s * s, 0.0).sum(dim=-1)
    return torch.where(seen, abs(c0) + abs(c1) * t + abs(c2) * t * t, 0.0).sum(dim=-1) / total.abs()


def evaluate(
    function: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor],
    *,
    upstream_dtype: torch.dtype | None = None,
    seed: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run `function(*tensors)` and pull random upstream gradients back: (floating outputs, gradient of each tensor).

    The tensors become leaves that keep their strides. `upstream_dtype` rounds the upstream gradients, so that a truth
    in float64 is pulled back from the very numbers a low-precision operation was given.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    result = function(*leaves)
    outputs = [t for t in ([result] if isinstance(result, Tensor) else result) if t.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    upstream = []
    for output in outputs:
        drawn = torch.randn(output.shape, dtype=torch.float64, generator=generator)
        upstream.append(drawn.to(upstream_dtype or output.dtype).to(device=output.device, dtype=output.dtype))
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
    return [output.detach() for output in outputs], filled


def assert_close_to_truth(
    actual: Tensor,
    truth: Tensor,
    *,
    dtype: torch.dtype | None = None,
    gradient: bool = False,
    floor: float = 0.0,
    what: str = "output",
) -> None:
    """Raise AssertionError unless shapes agree and the relative error is within the budget of `dtype`.

    `dtype` defaults to the dtype of `actual`; `floor` is the norm below which the error is taken as absolute.
    """
    dtype = dtype or actual.dtype
    limit = BUDGETS[dtype].gradient if gradient else BUDGETS[dtype].forward
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    error = relative_error(actual, truth, floor=floor)
    if not error <= limit:
        raise AssertionError(f"{what}: relative error {error:.3e} exceeds {limit:.1e} ({dtype})")


def assert_matches_truth(
    function: Callable[..., Tensor | Sequence[Tensor]],
    truth: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor],
    *,
    names: Sequence[str] = ("q", "k", "v"),
    dtype: torch.dtype | None = None,
) -> None:
    """Compare every output and the gradient of every input with the truth evaluated in float64 on the same numbers.

    A gradient far smaller than the largest (one key: dq = 0) is compared on a hundredth of the largest one's scale.
    """
    dtype = dtype or tensors[0].dtype
    outputs, gradients = evaluate(function, tensors)
    true_outputs, true_gradients = evaluate(truth, [t.double() for t in tensors], upstream_dtype=outputs[0].dtype)
    if len(outputs) != len(true_outputs):
        raise AssertionError(f"{len(outputs)} outputs, expected {len(true_outputs)}")
    for index, (output, expected) in enumerate(zip(outputs, true_outputs, strict=True)):
        assert_close_to_truth(output, expected, dtype=dtype, what=f"output {index}")
    floor = 1e-2 * max(g.norm().item() for g in true_gradients)
    for name, gradient, expected in zip(names, gradients, true_gradients, strict=True):
        assert_close_to_truth(gradient, expected, dtype=dtype, gradient=True, floor=floor, what=f"gradient of {name}")
