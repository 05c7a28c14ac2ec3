"""Predict the cost of sequence parallelism up to 1,024 GPUs and 100M tokens: table and figure of docs/distributed.md.

    python bench/machine/scale_out.py

Predicted from the cost model (`linattn.cost`), never measured: one causal attention layer, forward and backward, of a
sequence that is spread over P GPUs.

    time of P     (flops of N / P tokens + flops of summing up keys once more) / rate + exchanges
    exchanges     2 ceil(log2 P) (latency + bytes of the state / bandwidth)           forward and backward
    efficiency    time of 1 / (P * time of P)
    ring          softmax's scores of N / P queries, keys and values passed on P - 1 times meanwhile: the longer one
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from linattn import cost
from linattn._util import figures
from linattn._util.files import write_text
from linattn.bench.crossover.figures import require_matplotlib
from linattn.bench.report.marked_tables import replace_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "predicted" / "scale-out.csv"
FIGURE = ROOT / "docs" / "figures" / "scale-out.png"
PAGE = ROOT / "docs" / "distributed.md"
BEGIN = "<!-- table: python bench/machine/scale_out.py -->"

# What is assumed of a GPU and of the network between nodes: half of an H200's measured rate of bf16 products (790
# TFLOP/s), 400 Gbit/s a GPU.
RATE, BANDWIDTH, LATENCY = 395e12, 50e9, 20e-6
HEADS, CHUNK, BYTES_OF_A_KEY = 16, 512, 2
GPUS = (1, 8, 64, 512, 1024)
LENGTHS = (10**6, 10**7, 10**8)
KERNELS: tuple[tuple[cost.Kernel, int], ...] = (("quadratic", 64), ("quadratic", 128), ("feature_map", 64))


@dataclass(frozen=True)
class Prediction:
    """A prediction. sent_mb: MB that a GPU sends for a layer, both passes; ring_mb: what ring attention sends."""

    kernel: str
    D: int
    tokens: int
    gpus: int
    ms: float
    exchange_ms: float
    efficiency: float
    sent_mb: float
    ring_ms: float
    ring_mb: float


def predict(kernel: cost.Kernel, D: int, tokens: int, gpus: int) -> Prediction:
    """Predict one layer on so many GPUs, and softmax by ring attention on as many."""
    alone = _flops(kernel, "chunked", D, tokens) / RATE
    compute, sent, exchange = alone, 0.0, 0.0
    if gpus > 1:
        state = HEADS * cost.state_size(kernel, D, D) * cost.STATE_ITEMSIZE
        rounds = 2 * (gpus - 1).bit_length()
        sent = rounds * state
        exchange = rounds * LATENCY + sent / BANDWIDTH
        compute = (alone + _again(kernel, D, tokens) / RATE) / gpus
    seconds = compute + exchange
    # Keys and values forward; with their gradients backward.
    ring = (2 + 4) * (gpus - 1) * (tokens / gpus) * HEADS * D * BYTES_OF_A_KEY
    ring_seconds = max(_flops("softmax", "direct", D, tokens) / gpus / RATE, ring / BANDWIDTH)
    return Prediction(
        kernel, D, tokens, gpus, 1e3 * seconds, 1e3 * exchange, alone / (gpus * seconds), sent / 1e6,
        1e3 * ring_seconds, ring / 1e6,
    )  # fmt: skip


def _flops(kernel: cost.Kernel, form: cost.Form, D: int, tokens: int) -> int:
    return sum(
        cost.flops(kernel, form, B=1, H=HEADS, N=tokens, D=D, M=D, is_causal=True, chunk=CHUNK, backward=backward)
        for backward in (False, True)
    )


def _again(kernel: cost.Kernel, D: int, tokens: int) -> float:
    """Count the flops of summing up keys for the other ranks: one product with the features forward, two (dK, dV)
    backward.
    """
    features = cost.feature_count(D) if kernel == "quadratic" else D
    return HEADS * tokens * (1 + 2) * 2 * features * (D + 1)


def table(predictions: Sequence[Prediction]) -> str:
    """Format predictions as a Markdown table."""
    lines = [
        "| kernel | D | tokens | GPUs | ms a layer | of it exchange | efficiency | MB a GPU sends | ring: ms | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in predictions:
        size = f"| {one.kernel} | {one.D} | {one.tokens / 1e6:g}M | {one.gpus} |"
        time = f"{one.ms:.3g} | {one.exchange_ms:.3g} | {one.efficiency:.0%} |"
        traffic = f"{one.sent_mb:.3g} | {one.ring_ms:.3g} | {one.ring_mb:.3g} |"
        lines.append(f"{size} {time} {traffic}")
    return "\n".join(lines)


def draw(predictions: Sequence[Prediction]) -> Figure:
    """Draw efficiency against the number of GPUs, a panel a kernel, a line a length."""
    from matplotlib.ticker import PercentFormatter

    figure = figures.new_figure(11, 3.8)
    panels = figure.subplots(1, len(KERNELS), sharey=True)
    for axes, (kernel, D) in zip(panels, KERNELS, strict=True):
        for tokens, color, marker in zip(LENGTHS, (figures.BLUE, figures.ORANGE, figures.GREEN), "os^", strict=True):
            mine = [
                prediction
                for prediction in predictions
                if (prediction.kernel, prediction.D, prediction.tokens) == (kernel, D, tokens)
            ]
            label = f"{tokens // 10**6}M tokens"
            axes.plot([r.gpus for r in mine], [r.efficiency for r in mine], color=color, marker=marker, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(GPUS, [f"{gpus:,}" if gpus != 512 else "" for gpus in GPUS])  # 1,024 stands beside it
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("GPUs")
        axes.set_title(f"{kernel.replace('_', ' ')}, D = {D}")
        figures.add_grid(axes)
    panels[0].set_ylabel("efficiency, predicted")
    panels[0].legend()
    return figure


def main() -> int:
    """Write the results file, the figure and the page's table."""
    require_matplotlib()
    predictions = [predict(kernel, D, tokens, gpus) for kernel, D in KERNELS for tokens in LENGTHS for gpus in GPUS]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(asdict(predictions[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(prediction) for prediction in predictions)
    write_text(RESULTS, text.getvalue())
    figures.save(draw(predictions), FIGURE)
    write_text(PAGE, replace_table(PAGE.read_text(encoding="utf-8"), BEGIN, table(predictions)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
