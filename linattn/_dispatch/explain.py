"""Say what a call would do and why, from the first half of it (plan.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linattn import cost
from linattn._dispatch import plan as dispatch
from linattn.kernels.common.op.varlen import sequence_bounds

if TYPE_CHECKING:
    from linattn._dispatch.checks import Inputs


@dataclass(frozen=True)
class Explanation:
    """Say what a call would do, and why; `str()` is meant to be read.

    Attributes:
        kernel: the public name.
        op: the operation behind it.
        backend, form: what was chosen.
        reason: why this form.
        runs: the kernels and their configuration.
        refused: backends that cannot run these inputs, and why.
        cost: predicted flops, bytes and memory of the chosen form.
    """

    kernel: str
    op: str
    backend: str
    form: str
    reason: str
    runs: str
    refused: dict[str, str]
    cost: cost.Cost

    def __str__(self) -> str:
        work = f"{self.cost.flops / 1e9:.3g} GFLOP ({self.cost.flops_implemented / 1e9:.3g} as implemented)"
        moved = f"{self.cost.bytes_moved / 2**20:.3g} MiB moved, {self.cost.memory_bytes / 2**20:.3g} MiB held"
        lines = [
            f"{self.kernel}: {self.form} form on backend '{self.backend}'",
            f"  why      {self.reason}",
            f"  runs     {self.runs}",
            f"  cost     {work}, {moved}",
        ]
        lines += [f"  refused  {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def explain(q: Tensor, k: Tensor, v: Tensor, *, kernel: str = "quadratic", **options: Any) -> Explanation:
    """Tell what `attention(q, k, v, kernel=kernel, **options)` would run and why, and what it should cost.

    Example:
        >>> q = k = v = torch.empty(1, 4, 16384, 64)
        >>> explain(q, k, v, kernel="quadratic", is_causal=True).form
        'chunked'

    The predicted cost counts a causal call as if the last query were aligned with the last key, and packed sequences as
    if they were equally long. No arithmetic is done.

    Args:
        q: queries `[B, H, T, D]`.
        k: keys `[B, Hkv, Tk, D]`.
        v: values `[B, Hkv, Tk, M]`.
        kernel: a name that `attention` takes.
        **options: those of the call.

    Returns:
        An `Explanation`; `str()` of it is meant to be read.

    Raises:
        LinattnError: what the call would raise.
    """
    named = dispatch.resolve(kernel, q, options)
    options = {**named.defaults, **options}
    if named.op == "feature_map":
        options["with_data"] = False
    with torch.no_grad():
        _, inputs, _, _, with_state, plan = named.prepare(q, k, v, **options)
    if inputs.cu_seqlens is not None:
        sequence_bounds(inputs.cu_seqlens, q.shape[2])
    op, asked = named.op, options.get("form", "direct" if named.op == "softmax" else "auto")
    packed = inputs.sequences // q.shape[0]
    T, Tk = q.shape[2] // packed, k.shape[2] // packed
    predicted = cost.attention_cost(
        op,
        plan.form,  # type: ignore[arg-type]
        B=inputs.sequences,
        H=q.shape[1],
        N=T,
        D=q.shape[3],
        M=v.shape[3],
        keys=max(T, Tk) if inputs.is_causal else Tk,
        is_causal=inputs.is_causal,
        itemsize=q.itemsize,
    )
    return Explanation(
        kernel=kernel,
        op=op,
        backend=plan.backend,
        form=plan.form,
        reason=_reason(op, asked, inputs, plan.backend, with_state),
        runs=dispatch.describe(op, plan, q, k, v, inputs.is_causal),
        refused=dispatch.refusals(op, inputs, asked, with_state),
        cost=predicted,
    )


def _reason(op: str, asked: str, inputs: Inputs, backend: str, with_state: bool) -> str:
    """Return why a call has its form, in words."""
    if op == "softmax":
        return "softmax has no state to go through"
    if asked != "auto":
        return f"form={asked!r} was asked for"
    pays = dispatch.chunked_from(op, backend, inputs, with_state)
    source = dispatch.source_of_length(op, backend, inputs)
    return f"chunked pays from N = {pays:.0f} on ({source}); here N = {dispatch.effective_length(inputs):.0f}"
