"""Train the character language model on several processes, data-parallel or sharded.

torchrun --nproc-per-node 2 examples/train_parallel.py --text book.txt               every rank holds the model (DDP)
torchrun --nproc-per-node 2 examples/train_parallel.py --text book.txt --mode fsdp   every rank holds a part (FSDP2)

Each rank computes its share of every batch, so the losses are those of one process (up to rounding): plain
`python examples/train_parallel.py --text book.txt` is that process. With CUDA devices each rank takes one, and NCCL
carries the gradients; else gloo. Rank 0 leaves `result.json` and, whole, `model.pt` in the folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from linattn._util.files import write_json
from linattn.lm.model import CausalLM, CausalLMConfig
from linattn.lm.text import Characters, consecutive_windows, random_windows
from linattn.training import Record, Trainer, TrainingConfig, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Train, then write the results on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text file to learn")
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp", help="(default %(default)s)")
    parser.add_argument("--kernel", default="quadratic", help="attention kernel (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step, all ranks together (default 8)")
    parser.add_argument("--context", type=int, default=128, help="characters in a window (default %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="width of the model (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/parallel"), help="folder (default %(default)s)")
    args = parser.parse_args(argv)
    device = join_processes()
    try:
        trainer, model = prepare(args, device)
        finished = trainer.run()
        write_results(args, trainer, model)
    finally:
        dist.destroy_process_group()
    return 0 if finished else 130


def join_processes() -> torch.device:
    """Enter the group that torchrun made, or one of this process alone; return this rank's device."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return device


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[Trainer, nn.Module]:
    """The model, spread over the ranks, and its trainer."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = Characters.from_file(args.text)
    torch.manual_seed(SEED)  # the same weights on all ranks
    config = CausalLMConfig(
        len(text.alphabet), context=args.context, layers=2, dim=args.dim, heads=2, kernel=args.kernel
    )
    model = spread(CausalLM(config).to(device), args.mode, device)
    validation = consecutive_windows(text.validation, args.context)[:32].to(device)

    def mean_loss(windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def loss(step: int) -> Tensor:
        windows = random_windows(text.train, args.batch, args.context + 1, seed=SEED, step=step)
        return mean_loss(windows[rank::ranks].to(device))

    def report(record: Record) -> None:
        if rank == 0:
            print(f"step {record.step:5d}  validation {record.validation_loss:.4f}", flush=True)

    training = TrainingConfig(steps=args.steps, validate_every=max(1, args.steps // 4))
    trainer = Trainer(model, loss, lambda: mean_loss(validation).item(), training, on_record=report)
    return trainer, model


def spread(model: CausalLM, mode: str, device: torch.device) -> nn.Module:
    """The same model on every rank, or a part of every weight on each."""
    if mode == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def write_results(args: argparse.Namespace, trainer: Trainer, model: nn.Module) -> None:
    """Gather the weights, which takes all ranks, and write them and the history on rank 0."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return
    write_checkpoint(args.out / "model.pt", {"model": weights})
    result = {
        "settings": {"mode": args.mode, "kernel": args.kernel, "batch": args.batch, "context": args.context},
        "ranks": dist.get_world_size(),
        "history": [asdict(record) for record in trainer.history],
    }
    write_json(args.out / "result.json", result, indent=2)


if __name__ == "__main__":
    raise SystemExit(main())
