"""The error of the very outputs that were timed, against float64 on the same inputs.

Long sequences are judged on a sample of rows: row i of an output, and of dq, depends on row i of q alone, so the truth
of 64 rows costs 64 N (D + M) and not N^2 (D + M). dk and dv need every row; they are judged where all queries are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linattn.bench.measuring.cases import COEFFICIENTS, Method, Problem
from linattn.testing import TRUE_FEATURE_MAPS, relative_error, truth_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL_ROWS_UP_TO = 1024
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Truth:
    """Outputs, and in training gradients, of the queries that are judged, in float64."""

    queries: Tensor
    tensors: tuple[Tensor, ...]

    def error(self, results: Sequence[Tensor]) -> float:
        """Return the relative error of the output, by norm over the judged queries."""
        return relative_error(results[0][:, :, self.queries], self.tensors[0])

    def gradient_error(self, results: Sequence[Tensor]) -> float | None:
        """Return the largest relative error of the gradients: dq, and dk, dv where all queries are judged."""
        if len(self.tensors) == 1:
            return None
        pairs = list(zip(results[1:], self.tensors[1:], strict=False))
        errors = [relative_error(pairs[0][0][:, :, self.queries], pairs[0][1])]
        return max(errors + [relative_error(actual, truth) for actual, truth in pairs[1:]])


def judged_queries(N: int) -> Tensor:
    """Choose the queries to judge: all of a short sequence, else 64 spread evenly, first and last included."""
    return torch.arange(N) if N <= ALL_ROWS_UP_TO else torch.linspace(0, N - 1, SAMPLED_ROWS).round().long()


def truth_of(method: Method, problem: Problem, tensors: Sequence[Tensor], upstream: Tensor | None = None) -> Truth:
    """Return the truth of a method's operation on these inputs; methods with the same `op` share it."""
    queries = judged_queries(problem.N).to(tensors[0].device)
    training = problem.direction == "training"
    q, k, v = (t.detach().double() for t in (tensors[0][:, :, queries], tensors[1], tensors[2]))
    for t in (q, k, v):
        t.requires_grad_(training)
    seen = torch.arange(problem.N, device=queries.device) <= queries[:, None] if problem.is_causal else None

    def similarity(q: Tensor, k: Tensor) -> Tensor:
        weights = _similarity(method.op, q, k)
        return weights if seen is None else torch.where(seen, weights, 0.0)

    out = truth_attention(q, k, v, similarity, normalize=method.op != "plain")
    if not training or upstream is None:
        return Truth(queries, (out.detach(),))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream[:, :, queries].double())
    complete = problem.N <= ALL_ROWS_UP_TO
    return Truth(queries, (out.detach(), dq, dk, dv) if complete else (out.detach(), dq))


def _similarity(op: str, q: Tensor, k: Tensor) -> Tensor:
    """Return sim(q, k) of every pair, with the defaults of the public functions."""
    if op == "softmax":
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True))
    if op in COEFFICIENTS:
        c0, c1, c2 = COEFFICIENTS[op]
        s = q @ k.mT
        return c0 + c1 * s + c2 * s.square()
    if op == "plain":
        return q @ k.mT
    if op == "argmax":
        return torch.nn.functional.one_hot((q @ k.mT).argmax(dim=-1), k.shape[-2]).double()
    phi = TRUE_FEATURE_MAPS[op]
    return phi(q) @ phi(k).mT
