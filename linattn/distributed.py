"""Attention over a sequence that is spread over processes: states are exchanged, never keys.

Rank r of the process group holds the r-th slice of the sequence. Each rank sums up its own keys, the sums go round, and
each rank attends to its own keys and to what the others' sums stand for:

    causal       rank r starts from the sums of ranks 0 ... r - 1, by an exclusive scan of log2(ranks) steps
    not causal   every rank reads the sums of all ranks, by an all-reduce

What crosses the network does not depend on the length of the sequence: `linattn.cost.state_size` numbers in fp32 a key
head, once a scan step, and as much again in the backward pass. The results are those of one process that holds
everything, with exact gradients. Works with gloo (CPU) and NCCL (CUDA), with slices of any lengths, and inside autograd
like any other function.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py

Sources: Sun et al. 2024, "Linear attention sequence parallelism"; Hillis and Steele 1986, "Data parallel algorithms".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from linattn import functional
from linattn._dispatch.checks import check_flag
from linattn.errors import ArgumentError, refusal
from linattn.states import FeatureMapState, QuadraticState

if TYPE_CHECKING:
    from collections.abc import Callable

State = TypeVar("State", QuadraticState, FeatureMapState)
# The results of calls would differ from those of one process, or their meaning is taken.
TAKEN = ("cu_seqlens", "initial_state", "q_offset", "return_state", "form")


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """Run `linattn.quadratic_attention`, chunked, on a sequence spread over the ranks of a group.

    Args:
        q: this rank's slice of the queries, `[B, H, T, D]`. All but T is equal on all ranks.
        k: this rank's slice of the keys, `[B, Hkv, T, D]`; not causal, its T may differ from that of q.
        v: this rank's slice of the values, `[B, Hkv, T, M]`.
        is_causal: positions count on from rank to rank.
        key_mask: bool `[B, T]`, True for keys of this slice that count.
        group: the processes; all of them when not given.
        **options: `scale`, `coefficients`, `normalize`, `enable_gqa`, `backend`, equal on all ranks.

    Returns:
        This rank's slice of the result, `[B, H, T, M]`.

    Raises:
        ArgumentError: there is no process group, or an option that only one process can have.
        The rest: what the function itself raises, on the ranks whose inputs are wrong; the others then wait in vain.

    Complexity: O(T D^2 M) on each rank, 3/2 of one process's share when causal (keys are summed up once for the others
    and once more on the way), plus log2(ranks) messages of one state each.

    Example (on every rank):
        out = distributed.quadratic_attention(q, k, v, is_causal=True, scale=D**-0.5)
    """
    shared: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask, "group": group}
    return _attend(functional.quadratic_attention, QuadraticState, q, k, v, **shared, options=options)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """Run `linattn.linear_attention`, chunked, on a sequence spread over the ranks of a group.

    As `quadratic_attention` here, with the options `feature_map`, `scale`, `normalize`, `enable_gqa`, `backend`.
    Gradients of a feature map's own parameters are those of this rank's slice: add them up over the ranks, as
    data-parallel training does.
    """
    shared: dict[str, Any] = {"is_causal": is_causal, "key_mask": key_mask, "group": group}
    return _attend(functional.linear_attention, FeatureMapState, q, k, v, **shared, options=options)


def _attend(
    function: Callable[..., Any],
    kind: Callable[..., State],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    group: dist.ProcessGroup | None,
    options: dict[str, Any],
) -> Tensor:
    check_flag("is_causal", is_causal)
    if not dist.is_available() or not dist.is_initialized():
        raise refusal(
            ArgumentError,
            "a sequence is spread over the processes of a group",
            given="no process group",
            accepted="a call after torch.distributed.init_process_group",
        )
    for name in TAKEN:
        if name in options:
            raise refusal(
                ArgumentError,
                "an option has no meaning for a sequence spread over processes",
                given=f"{name}={options[name]!r}",
                accepted="a call without it",
            )
    group = dist.group.WORLD if group is None else group
    options["form"] = "chunked"
    # One query, for the sake of the state; its output is not used.
    _, own = function(q[:, :, :1].detach(), k, v, key_mask=key_mask, return_state=True, **options)
    out: Tensor
    if is_causal:
        before = kind(*_SumOfEarlier.apply(group, *own))  # type: ignore[no-untyped-call]
        out = function(q, k, v, is_causal=True, key_mask=key_mask, initial_state=before, **options)
    else:
        everything = kind(*_SumOfAll.apply(group, *own))  # type: ignore[no-untyped-call]
        # The state holds all keys already: a call needs one, and it does not count.
        nothing = torch.zeros(k.shape[0], 1, dtype=torch.bool, device=k.device)
        out = function(q, k[:, :, :1], v[:, :, :1], key_mask=nothing, initial_state=everything, **options)
    return out


class _SumOfEarlier(torch.autograd.Function):
    """Add up what the ranks before this one hold. The gradient is what the ranks after it want, added up."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, n: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        before = _exclusive_scan([n, _packed(sums)], group, step=1)
        ctx.mark_non_differentiable(before[0])
        return before[0], *_unpacked(before[1], sums)

    @staticmethod
    def backward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (after,) = _exclusive_scan([_packed(gradients)], ctx.group, step=-1)
        return None, None, *_unpacked(after, gradients)


class _SumOfAll(torch.autograd.Function):
    """Add up what all ranks hold. The gradient is what all ranks want, added up."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, n: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        total, packed = n.clone(), _packed(sums)
        dist.all_reduce(total, group=group)
        dist.all_reduce(packed, group=group)
        ctx.mark_non_differentiable(total)
        return total, *_unpacked(packed, sums)

    @staticmethod
    def backward(ctx: Any, _: Tensor, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packed = _packed(gradients)
        dist.all_reduce(packed, group=ctx.group)
        return None, None, *_unpacked(packed, gradients)


def _packed(tensors: tuple[Tensor, ...]) -> Tensor:
    """All of them in one row: one message instead of five."""
    return torch.cat([x.flatten() for x in tensors])


def _unpacked(row: Tensor, like: tuple[Tensor, ...]) -> list[Tensor]:
    parts = torch.split(row, [x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def _exclusive_scan(own: list[Tensor], group: dist.ProcessGroup, step: int) -> list[Tensor]:
    """The sums over all ranks before this one (step = 1) or after it (step = -1), in ceil(log2(ranks)) exchanges.

    After the exchange over distance d, `found` covers the 2 d - 1 nearest ranks on that side.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    found = [torch.zeros_like(x) for x in own]
    distance = 1
    while distance < ranks:
        to, source = rank + step * distance, rank - step * distance
        sent = [a + b for a, b in zip(own, found, strict=True)]
        received = [torch.empty_like(x) for x in own]
        exchange = [dist.P2POp(dist.isend, x, group=group, group_peer=to) for x in sent if 0 <= to < ranks]
        exchange += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in received if 0 <= source < ranks]
        for request in dist.batch_isend_irecv(exchange) if exchange else ():
            request.wait()
        if 0 <= source < ranks:
            found = [a + b for a, b in zip(found, received, strict=True)]
        distance *= 2
    return found
