"""Decoding against position: time per token and memory of the cache, token after token, to 100,000 tokens.

    python bench/machine/decode.py               from a checkout, installed or not

One language model a kernel, untrained (times do not depend on weights), batch 1. At positions that grow by half, a
stretch of tokens is decoded one by one and timed; between stretches the model reads random tokens in pieces, which
leaves the cache that single tokens would have left. A kernel whose time is up stops early, which the table and the
figure say. Writes decode.json and decode.png to --out after every kernel, so that it can be interrupted and run again:
kernels that are there, with the same settings on the same machine, are not measured twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from linattn._util import figures
from linattn._util.environment import pick_device
from linattn._util.files import write_json
from linattn._util.tables import text_table
from linattn.bench.crossover.figures import require_matplotlib
from linattn.bench.measuring.environment import describe
from linattn.bench.measuring.timing import summarise
from linattn.errors import ArgumentError
from linattn.lm.model import CausalLM, CausalLMConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

KERNELS = ("softmax", "quadratic", "elu+1")
COLORS = (figures.DARK_GREY, figures.BLUE, figures.GREEN, figures.VERMILION, figures.PURPLE, figures.ORANGE)
NAME = "decode.json"
GROWTH = 1.5
STRETCH = 100
PIECE = 512


@dataclass(frozen=True)
class Stretch:
    """Tokens decoded one by one, up to position `last`.

    Attributes:
        median_ms, p20_ms, p80_ms: of the time of a token. cache_bytes: held by all layers after the last.
    """

    last: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    cache_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a decoding measurement."""
    parser.add_argument("--out", type=Path, default=Path("runs/decode"), help="folder for results (%(default)s)")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="separated by commas (%(default)s)")
    parser.add_argument("--longest", type=int, default=100_000, metavar="N", help="last position (%(default)s)")
    parser.add_argument("--seconds", type=float, default=150.0, help="for each kernel (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="width of the model (%(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--device", help="cuda, cpu (default: cuda if there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, print, draw."""
    require_matplotlib()
    if args.longest < 2 * STRETCH or not args.seconds > 0:
        raise ArgumentError(
            f"--longest {args.longest} --seconds {args.seconds}; accepted: at least {2 * STRETCH}, and above 0"
        )
    device = pick_device(args.device)
    environment = describe(device)
    settings = {name: getattr(args, name) for name in ("longest", "seconds", "layers", "dim", "heads")}
    found = {"environment": asdict(environment), "settings": settings, "kernels": {}}
    path = args.out / NAME
    if path.is_file():
        before = json.loads(path.read_text())
        same = ("slug", "device", "threads", "torch", "sources")
        if before["settings"] == settings and all(before["environment"][x] == found["environment"][x] for x in same):
            found = before
    for kernel in args.kernels.split(","):
        if kernel not in found["kernels"]:
            print(f"{kernel} ...", file=sys.stderr, flush=True)
            stretches = decode(kernel, settings, device)
            found["kernels"][kernel] = [asdict(stretch) for stretch in stretches]
            write_json(path, found)
    figures.save(draw(found), path.with_suffix(".png"))
    print(table(found))
    print(f"\nwritten: {path}, {path.with_suffix('.png')}")
    return 0


@torch.no_grad()
def decode(kernel: str, settings: dict[str, Any], device: torch.device) -> list[Stretch]:
    """Decode stretches up to position `longest`, or until so many seconds are spent."""
    sizes = {name: settings[name] for name in ("layers", "dim", "heads")}
    torch.manual_seed(0)
    model = CausalLM(CausalLMConfig(vocabulary=65, kernel=kernel, **sizes)).eval().to(device)
    cache = model.decode_cache()
    positions = [STRETCH]
    while positions[-1] < settings["longest"]:
        positions.append(min(int(positions[-1] * GROWTH) + STRETCH, settings["longest"]))
    stretches: list[Stretch] = []
    done, started = 0, time.monotonic()
    for last in positions:
        while done < last - STRETCH:
            piece = min(PIECE, last - STRETCH - done)
            model(torch.randint(65, (1, piece), device=device), cache=cache)
            done += piece
            if time.monotonic() - started > settings["seconds"]:
                return stretches
        times = []
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        for _ in range(last - done):
            before = time.perf_counter()
            token = model(token, cache=cache)[:, -1:].argmax(-1)
            token.item()  # waits for the device
            times.append(1e3 * (time.perf_counter() - before))
        done = last
        summary = summarise(times)
        stretches.append(Stretch(last, summary.median, summary.p20, summary.p80, cache.nbytes))
    return stretches


def table(found: dict[str, Any]) -> str:
    """Format a line a kernel and power of 10, and where each kernel stopped."""
    rows: list[Sequence[object]] = []
    for kernel, stretches in found["kernels"].items():
        wanted = [p for p in (100, 1_000, 10_000, 100_000) if p < stretches[-1]["last"]] + [stretches[-1]["last"]]
        for position in wanted:
            at = next(s for s in stretches if s["last"] >= position)
            end = "stopped: time was up" if position == stretches[-1]["last"] < found["settings"]["longest"] else ""
            rows.append((kernel, str(position), at["median_ms"], at["cache_bytes"] / 2**20, end))
    return text_table(("kernel", "position", "ms a token", "cache (MiB)", ""), rows)


def draw(found: dict[str, Any]) -> Figure:
    """Time of a token and memory of the cache against position."""
    figure = figures.new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    for (kernel, stretches), color in zip(found["kernels"].items(), COLORS, strict=False):
        last = [s["last"] for s in stretches]
        early = last[-1] < found["settings"]["longest"]
        label = f"{kernel}, stopped at {last[-1]:,}: time was up" if early else kernel
        left.plot(last, [s["median_ms"] for s in stretches], color=color, label=label)
        left.fill_between(
            last, [s["p20_ms"] for s in stretches], [s["p80_ms"] for s in stretches], color=color, alpha=0.2
        )
        right.plot(last, [s["cache_bytes"] / 2**20 for s in stretches], color=color, label=label)
        if early:
            left.plot(last[-1], stretches[-1]["median_ms"], "x", color=color)
            right.plot(last[-1], stretches[-1]["cache_bytes"] / 2**20, "x", color=color)
    left.set(ylabel="time of a token (ms; median, 20 to 80 %)", title="Time")
    right.set(ylabel="memory held by the cache (MiB)", title="Memory")
    for axes in (left, right):
        figures.set_log_scale(axes)
        axes.set(xscale="log", xlabel="position (tokens decoded)")
        figures.add_grid(axes, which="both")
    left.legend()
    sizes, machine = found["settings"], found["environment"]
    figure.suptitle(
        f"Decoding token by token: {sizes['layers']} layers, width {sizes['dim']}, {sizes['heads']} heads, batch 1, "
        f"fp32, {machine['threads']} threads"
    )
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
