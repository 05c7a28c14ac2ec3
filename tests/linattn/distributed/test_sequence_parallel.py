"""Attention over a sequence spread over 2 and 4 processes (gloo), held against one process's truth in float64.

The processes run this very file: every rank computes its slice of every case and leaves it in a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linattn import distributed
from linattn.errors import ArgumentError
from linattn.functional import TAYLOR
from linattn.testing import assert_close_to_truth, make_inputs, make_key_mask, truth_linear, truth_quadratic

RANKS = (2, 4)
LENGTHS = (40, 17, 1, 22)  # of the slices of 4 ranks; 2 ranks take the first and the sum of the others


@dataclass(frozen=True)
class Case:
    function: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    is_causal: bool
    dtype: torch.dtype = torch.float64
    masked: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    truth_options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """q, k, v of the whole sequence, its key mask, and the gradient of its output."""
        tensors = make_inputs(**{"heads": 4, "keys": sum(LENGTHS), "dtype": self.dtype, **self.sizes})
        mask = make_key_mask(2, sum(LENGTHS)) if self.masked else None
        upstream = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], generator=torch.Generator().manual_seed(5))
        return list(tensors), mask, upstream.to(self.dtype)


QUADRATIC = (distributed.quadratic_attention, truth_quadratic)
LINEAR = (distributed.linear_attention, truth_linear)
ELU = {"truth_options": {"feature_map": "elu+1"}, "options": {"feature_map": "elu+1"}}
CASES = {
    "quadratic causal": Case(*QUADRATIC, True),
    "quadratic": Case(*QUADRATIC, False),
    "quadratic causal fp32": Case(*QUADRATIC, True, torch.float32),
    "quadratic fp32": Case(*QUADRATIC, False, torch.float32),
    "quadratic causal bf16": Case(*QUADRATIC, True, torch.bfloat16),
    "quadratic causal masked": Case(*QUADRATIC, True, masked=True),
    "quadratic masked": Case(*QUADRATIC, False, masked=True),
    "quadratic grouped, M != D": Case(
        *QUADRATIC, True, sizes={"kv_heads": 2, "value_size": 5}, options={"enable_gqa": True}
    ),
    "taylor, scaled": Case(
        *QUADRATIC,
        True,
        options={"coefficients": TAYLOR, "scale": 0.5},
        truth_options={"coefficients": TAYLOR, "scale": 0.5},
    ),
    "quadratic not normalised": Case(
        *QUADRATIC, True, options={"normalize": False}, truth_options={"normalize": False}
    ),
    "elu+1 causal": Case(*LINEAR, True, **ELU),
    "elu+1 masked": Case(*LINEAR, False, masked=True, **ELU),
    "elu+1 causal fp32": Case(*LINEAR, True, torch.float32, **ELU),
}


def rank_lengths(ranks: int) -> list[int]:
    return list(LENGTHS) if ranks == 4 else [LENGTHS[0], sum(LENGTHS[1:])]


def compute_slices(rank: int, ranks: int) -> dict[str, list[Tensor]]:
    """This rank's slices of the output and of dq, dk, dv, for every case."""
    results = {}
    for name, case in CASES.items():
        tensors, mask, upstream = case.inputs()
        mine = [t.split(rank_lengths(ranks), dim=2)[rank].clone().requires_grad_() for t in tensors]
        key_mask = None if mask is None else mask.split(rank_lengths(ranks), dim=1)[rank]
        out = case.function(*mine, is_causal=case.is_causal, key_mask=key_mask, **case.options)
        gradients = torch.autograd.grad(out, mine, upstream.split(rank_lengths(ranks), dim=2)[rank])
        results[name] = [out.detach(), *gradients]
    return results


def learned(weight: Tensor, attend: Callable[..., Tensor], rows: slice) -> Tensor:
    """The gradient of a feature map's own weight, from these rows of q, k and v."""
    tensors = [t[:, :, rows] for t in make_inputs(keys=sum(LENGTHS))]
    out = attend(*tensors, is_causal=True, feature_map=lambda x: torch.nn.functional.softplus(x @ weight))
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    return gradient


def make_weight() -> Tensor:
    return torch.eye(8, dtype=torch.float64).requires_grad_()


@pytest.fixture(scope="module", params=RANKS)
def ranks_results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, list[Tensor]]]:
    """Return what each rank computed: its slices of out, dq, dk and dv for every case, and the gradient of a weight."""
    ranks: int = request.param
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(ranks)}
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(ranks)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("name", CASES)
def test_slices_are_those_of_one_process(name: str, ranks_results: list[dict[str, list[Tensor]]]) -> None:
    case = CASES[name]
    tensors, mask, upstream = case.inputs()
    leaves = [t.double().requires_grad_() for t in tensors]
    out = case.truth(*leaves, is_causal=case.is_causal, key_mask=mask, **case.truth_options)
    gradients = torch.autograd.grad(out, leaves, upstream.double())
    joined = [torch.cat(slices, dim=2) for slices in zip(*(r[name] for r in ranks_results), strict=True)]
    assert_close_to_truth(joined[0], out.detach())
    for actual, expected in zip(joined[1:], gradients, strict=True):
        assert_close_to_truth(actual, expected, gradient=True)


def test_gradients_of_a_map_add_up_over_the_ranks(ranks_results: list[dict[str, list[Tensor]]]) -> None:
    actual = torch.stack([results["weight"][0] for results in ranks_results]).sum(0)
    assert_close_to_truth(actual, learned(make_weight(), truth_linear, slice(None)), gradient=True)


def test_without_a_process_group_the_error_says_so() -> None:
    with pytest.raises(ArgumentError, match="init_process_group"):
        distributed.quadratic_attention(*make_inputs())


def main(folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name in distributed.TAKEN:
        with pytest.raises(ArgumentError, match=name):
            distributed.linear_attention(*make_inputs(), **{name: None})
    start = sum(rank_lengths(ranks)[:rank])
    rows = slice(start, start + rank_lengths(ranks)[rank])
    results = {**compute_slices(rank, ranks), "weight": [learned(make_weight(), distributed.linear_attention, rows)]}
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
