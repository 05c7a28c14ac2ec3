"""One long sequence on several processes: each holds a slice, and only sums over keys travel between them.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py

Every rank attends for its slice, forward and backward; rank 0 then does the whole alone, and prints how far both are
apart and what travelled, beside what exchanging the keys and values would have taken (ring attention).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

import linattn
from linattn import cost, distributed
from linattn._util.tables import text_table
from linattn.bench.studies.train_parallel import join_processes

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNELS: tuple[cost.Kernel, ...] = ("quadratic", "feature_map")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if slices and whole agree to 1e-4 in every kernel, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--length", type=int, default=8192, help="positions of the whole sequence (default %(default)s)"
    )
    parser.add_argument("--heads", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--head-size", type=int, default=32, help="D = M (default %(default)s)")
    args = parser.parse_args(argv)
    device = join_processes()
    try:
        errors = {kernel: compare(kernel, args, device) for kernel in KERNELS}
        if dist.get_rank() == 0:
            print(report(errors, args))
    finally:
        dist.destroy_process_group()
    return 0 if all(max(found) < 1e-4 for found in errors.values()) else 1


def compare(kernel: cost.Kernel, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Largest relative error of any rank's output and gradients against the whole sequence on one process."""
    generator = torch.Generator().manual_seed(0)  # every rank draws the whole, and keeps its slice
    shape = (1, args.heads, args.length, args.head_size)
    whole = [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(3)]
    rows = torch.arange(args.length).tensor_split(dist.get_world_size())[dist.get_rank()].to(device)
    mine = [t.detach()[:, :, rows].requires_grad_() for t in whole]
    if kernel == "quadratic":
        scale = args.head_size**-0.5
        out = distributed.quadratic_attention(*mine, is_causal=True, scale=scale)
        alone = linattn.quadratic_attention(*whole, is_causal=True, scale=scale, form="chunked")
    else:
        out = distributed.linear_attention(*mine, is_causal=True, feature_map="elu+1")
        alone = linattn.linear_attention(*whole, is_causal=True, feature_map="elu+1", form="chunked")
    gradients = torch.autograd.grad(out.square().sum(), mine)
    expected = torch.autograd.grad(alone.square().sum(), whole)
    largest = max(_error(a, e[:, :, rows]) for a, e in zip(gradients, expected, strict=True))
    errors = torch.tensor([_error(out.detach(), alone.detach()[:, :, rows]), largest], device=device)
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    return errors[0].item(), errors[1].item()


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def report(errors: dict[cost.Kernel, tuple[float, float]], args: argparse.Namespace) -> str:
    """The errors, and what a rank sends in a forward pass."""
    ranks, D = dist.get_world_size(), args.head_size
    rows = []
    for kernel, (output, gradient) in errors.items():
        state = args.heads * cost.state_size(kernel, D, D) * cost.STATE_ITEMSIZE * (ranks - 1).bit_length()
        keys = args.heads * args.length * 2 * D * 4 * (ranks - 1) // ranks
        rows.append((kernel, f"{output:.1e}", f"{gradient:.1e}", f"{state / 2**20:.3f}", f"{keys / 2**20:.3f}"))
    header = ("kernel", "error of outputs", "of gradients", "MiB a rank sends", "keys and values instead")
    return f"{ranks} ranks, {args.length} positions\n{text_table(header, rows)}"


if __name__ == "__main__":
    raise SystemExit(main())
