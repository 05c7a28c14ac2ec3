"""Train a character language model on several processes, data-parallel or, with `--mode fsdp`, sharded.

torchrun --nproc-per-node 2 examples/train_parallel.py --text book.txt
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from linattn.lm import CausalLM, CausalLMConfig, Characters
from linattn.lm.text import consecutive_windows, random_windows
from linattn.training import Trainer, TrainingConfig, write_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--text", required=True, help="UTF-8 text file to learn")
parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp")
parser.add_argument("--out", type=Path, default=Path("runs/parallel"))
for option, default in {"steps": 200, "batch": 8, "context": 128, "dim": 64}.items():
    parser.add_argument(f"--{option}", type=int, default=default)
args = parser.parse_args()

dist.init_process_group()  # NCCL carries CUDA tensors, gloo all others
rank, ranks = dist.get_rank(), dist.get_world_size()
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
text = Characters.from_file(args.text)
torch.manual_seed(0)  # the same weights on every rank
model = CausalLM(CausalLMConfig(len(text.alphabet), kernel="quadratic", layers=2, dim=args.dim, heads=2)).to(device)
for part in (*model.transformer.layers, model) if args.mode == "fsdp" else ():
    fully_shard(part)
if args.mode == "ddp":
    model = DistributedDataParallel(model)


def mean_loss(windows: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of each token given those before it, for windows `[B, N + 1]`."""
    windows = windows.to(device)
    return torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


batch = partial(random_windows, text.train, args.batch, args.context + 1, seed=0)  # each rank takes its share
validation = consecutive_windows(text.validation, args.context)[:32]
schedule = TrainingConfig(steps=args.steps, validate_every=max(1, args.steps // 4))
trainer = Trainer(
    model, lambda step: mean_loss(batch(step=step)[rank::ranks]), lambda: mean_loss(validation).item(), schedule
)
trainer.run()
weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    write_checkpoint(args.out / "model.pt", {"model": weights, "losses": [r.validation_loss for r in trainer.history]})
dist.destroy_process_group()
