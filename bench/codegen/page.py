"""The static report as a page: results file, figure and table of docs/gpu-kernels.md.

python bench/codegen/page.py             compile every kernel (some 20 minutes on one core), then write all three
python bench/codegen/page.py --required  only the kernels that the gate requires (some minutes)
python bench/codegen/page.py --draw      figure and table anew, from the results file that is there
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linattn._util import figures
from linattn._util.files import write_text
from linattn.bench.codegen import command
from linattn.bench.codegen.command import ARCHITECTURES, OPERATIONS, KernelRecord
from linattn.bench.report.marked_tables import replace_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "static" / "kernels.json"
FIGURE = ROOT / "docs" / "figures" / "gpu-kernels.png"
PAGE = ROOT / "docs" / "gpu-kernels.md"
BEGIN = "<!-- table: python bench/codegen/page.py -->"

SHOWN = ("sm_90", "sm_80")
HEADINGS = (
    "kernel", "D", "on", "tiles, warps, stages", "registers (spilled)", "KB shared", "fit",
    "per tile: matrix instructions", "full waits", "MFLOP", "KB", "B per matrix clock", "share",
)  # fmt: skip
PANELS = (("softmax", "direct"), ("quadratic", "direct"), ("quadratic", "chunked"), ("feature_map", "chunked"))


def main(argv: Sequence[str] | None = None) -> int:
    """Write what was asked for; 1 if a kernel breaks the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="compile nothing, use the results file")
    parser.add_argument("--required", action="store_true", help="only the kernels that the gate requires")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, with commas (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile (%(default)s)")
    args = parser.parse_args(argv)
    figures.require_matplotlib("bench", "the page of the static report")
    if not args.draw:
        report = command.collect(args.arch.split(","), OPERATIONS, jobs=args.jobs, required_only=args.required)
        write_text(RESULTS, _one_record_per_line(report))
    report = json.loads(RESULTS.read_text())
    figures.save(draw(report), FIGURE)
    write_text(PAGE, replace_table(PAGE.read_text(), BEGIN, table(report["rows"])))
    failed = command.broken(report)
    print(f"{len(report['rows'])} rows; {len(failed)} of the required ones break the gate")
    return 1 if failed else 0


def draw(report: dict[str, Any]) -> Figure:
    """Estimated share of the matrix unit's peak over head size, a row of panels for each form of each operation."""
    figure = figures.new_figure(11, 2.9 * len(PANELS) + 0.8)
    grid = figure.subplots(len(PANELS), len(SHOWN), sharey=True, squeeze=False)
    for line, (op, form) in zip(grid, PANELS, strict=True):
        for axes, architecture in zip(line, SHOWN, strict=True):
            rows = [
                row
                for row in report["rows"]
                if (row["op"], row["form"], row["architecture"]) == (op, form, architecture)
            ]
            _panel(axes, [row for row in rows if row["dtype"] == "bf16" and row["causal"] and row.get("share")])
            axes.set_title(f"{op}, {form} form, {architecture}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("head size D = M")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of peak, estimated")
    versions = report["versions"]
    figure.suptitle(
        f"Read in machine code, not measured on a GPU: bf16, causal, Triton {versions['triton']}\n"
        "dot: nothing overlaps with the matrix unit; end of the line: everything does",
        fontsize=11,
    )
    return figure


def _panel(axes: Axes, rows: Sequence[KernelRecord]) -> None:
    sizes = (16, 32, 64, 128, 256)
    names = list(dict.fromkeys((row["direction"], row["kernel"]) for row in rows))
    for index, (direction, kernel) in enumerate(names):
        of_kernel = [row for row in rows if (row["direction"], row["kernel"]) == (direction, kernel)]
        places = [sizes.index(row["D"]) + 0.8 * ((index + 0.5) / len(names) - 0.5) for row in of_kernel]
        low, high = zip(*(row["share"] for row in of_kernel), strict=True)
        color = figures.PALETTE[index % len(figures.PALETTE)]
        axes.vlines(places, low, high, color=color, linewidth=2.5, alpha=0.45)
        axes.plot(places, low, "o", color=color, markersize=4.5, label=f"{direction}: {kernel}")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_ylim(0, 1.3)
    axes.grid(axis="y", alpha=0.3)
    if names:
        axes.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper left")
    else:
        axes.text(0.5, 0.5, "no kernel of this form in the results file", ha="center", transform=axes.transAxes)


def table(rows: Sequence[KernelRecord]) -> str:
    """Markdown: causal bf16 kernels at D = 64 and 128, one line a kernel and architecture."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    usual = [row for row in rows if row["dtype"] == "bf16" and row["causal"] and row["D"] in (64, 128)]
    lines += [_line(row) for row in usual if row["architecture"] in SHOWN and "registers" in row]
    return "\n".join(lines)


def _line(row: KernelRecord) -> str:
    share = row["share"]
    cells = [
        f"{row['op']} {row['form']} {row['direction']}: {row['kernel']}",
        row["D"],
        row["architecture"],
        row["configuration"],
        f"{row['registers']} ({row['spill_bytes']})",
        f"{row['shared_bytes'] / 1024:.0f}",
        row["programs"],
        row["matrix_per_tile"],
        row["full_waits"],
        f"{row['flops_per_tile'] / 1e6:.2f}",
        f"{row['bytes_per_tile'] / 1024:.1f}",
        f"{row['bytes_per_matrix_clock']:.0f}" if share else "",
        f"{share[0]:.2f} to {share[1]:.2f}" if share else "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _one_record_per_line(report: dict[str, Any]) -> str:
    rows = ",\n".join(json.dumps(row) for row in report["rows"])
    head = json.dumps({**report, "rows": []}, indent=1)
    return head.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n"


if __name__ == "__main__":
    sys.exit(main())
