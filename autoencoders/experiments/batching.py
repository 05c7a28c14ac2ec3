"""`linattn sweep batching`: are several repeats faster as one batched model, or one by one?

For each size a step of training (losses, gradients, Adam) is timed both ways, in turns, on one thread, as `linattn
sweep ae` uses them: it runs as many processes as there are cores. `repeats.BATCHED_PAYS_BELOW` follows from the result.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from linattn._util.argtypes import whole
from linattn._util.environment import describe
from linattn._util.files import write_json
from linattn._util.tables import text_table
from linattn.autoencoders.models.autoencoder import DenoisingAutoencoder
from linattn.autoencoders.models.repeats import BATCHED_PAYS_BELOW, Batched, Repeats, Separate

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

# Input size and batch of digits, synthetic and MNIST; sizes of the sweep's encoders.
SETS = {"digits": (64, 50), "synthetic": (100, 100), "mnist": (784, 200)}
ENCODERS = ((5,), (100,), (1000,), (256, 5), (256, 100), (256, 1000))
RESULT_NAME = "batching.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --repeats, --rounds and --out."""
    parser.add_argument("--repeats", type=whole, default=5, help="models trained at once (%(default)s)")
    parser.add_argument("--rounds", type=whole, default=7, help="turns, whose median counts (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs") / "batching", help="folder (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write `batching.json`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [
            measure(name, size, batch, hidden, args.repeats, args.rounds)
            for name, (size, batch) in SETS.items()
            for hidden in ENCODERS
        ]
        environment = asdict(describe(torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)
    header = ("set", "encoder", "parameters", "batched (ms)", "one by one (ms)", "ratio")
    print(f"time of a training step per model, {args.repeats} models, one thread")
    print(text_table(header, rows))
    limits = " and ".join(f"{limit:,} {name}" for name, limit in BATCHED_PAYS_BELOW.items())
    print(f"ratio above 1: batching pays; the sweep batches models below {limits}")
    result = {"repeats": args.repeats, "columns": header, "rows": rows, "environment": environment}
    write_json(args.out / RESULT_NAME, result)
    return 0


def measure(
    name: str, size: int, batch: int, hidden: Sequence[int], repeats: int, rounds: int
) -> tuple[str, str, int, float, float, float]:
    """Measure one entry of the table: medians over the rounds of milliseconds a step and model, and their ratio."""
    models = [DenoisingAutoencoder(size, hidden) for _ in range(repeats)]
    parameters = sum(parameter.numel() for parameter in models[0].parameters())
    x = torch.rand(repeats, batch, size)
    steps = {"batched": _step(Batched(models), x), "one by one": _step(Separate(models), x)}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            times[way].append(_milliseconds(step) / repeats)
    batched, alone = (statistics.median(values) for values in times.values())
    return name, "-".join(map(str, (size, *hidden))), parameters, batched, alone, alone / batched


def _step(models: Repeats, x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(models.parameters(), lr=5e-4, fused=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(x))]

    def step() -> None:
        models.losses(x, "sum", generators).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    return step


def _milliseconds(step: Callable[[], None], steps: int = 10) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return 1000 * (time.perf_counter() - started) / steps
