"""Attend to one long sequence on several processes: each holds a slice, and only sums over keys travel.

torchrun --nproc-per-node 2 examples/sequence_parallel.py

Every rank attends for its slice, forward and backward, and compares with the whole sequence on one process.
"""

import argparse

import torch
import torch.distributed as dist

import linattn
from linattn import cost, distributed

parser = argparse.ArgumentParser()
parser.add_argument("--length", type=int, default=8192, help="positions of the whole sequence")
parser.add_argument("--head-size", type=int, default=32, help="D = M")
args = parser.parse_args()
HEADS, D = 2, args.head_size

dist.init_process_group("gloo")  # on GPUs "nccl", with the tensors on this rank's device
rank, ranks = dist.get_rank(), dist.get_world_size()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the norm of the difference over the norm of what was expected."""
    return (actual - expected).norm() / expected.norm()


generator = torch.Generator().manual_seed(0)  # every rank draws the whole, and keeps its slice
whole = [torch.randn(1, HEADS, args.length, D, generator=generator).requires_grad_() for _ in range(3)]
here = torch.arange(args.length).tensor_split(ranks)[rank]
mine = [x.detach()[:, :, here].requires_grad_() for x in whole]

out = distributed.quadratic_attention(*mine, is_causal=True, scale=D**-0.5)
gradients = torch.autograd.grad(out.square().sum(), mine)

alone = linattn.quadratic_attention(*whole, is_causal=True, scale=D**-0.5, form="chunked")
expected = torch.autograd.grad(alone.square().sum(), whole)

pairs = [(out, alone), *zip(gradients, expected, strict=True)]
worst = torch.stack([relative_error(a, e[:, :, here]) for a, e in pairs]).max().detach()
dist.all_reduce(worst, op=dist.ReduceOp.MAX)
if rank == 0:
    state = HEADS * cost.state_size("quadratic", D, D) * cost.STATE_ITEMSIZE
    keys = HEADS * args.length * 2 * D * 4
    print(f"{ranks} ranks, {args.length} positions: largest relative error {worst:.1e}")
    print(f"what travels: a state of {state / 2**20:.3f} MiB; keys and values would be {keys / 2**20:.3f} MiB")
dist.destroy_process_group()
assert worst < 1e-4
