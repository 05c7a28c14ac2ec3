"""`make gpu`: everything that has to be measured on a GPU, in one command and under 9 minutes.

    python bench/gpu/command.py                          all stages, most important first
    python bench/gpu/command.py --only direct,chunked    some of them; what the others found before stays in the file
    python bench/gpu/command.py --missing                only what the file lacks
    python bench/gpu/command.py --rehearse               the same on the CPU, in Triton's interpreter, at tiny sizes
    python bench/gpu/command.py --only figures --out bench/results/DEVICE    anywhere, from the file

It needs torch, Triton and, for one stage, pytest, and no network; pytest-xdist makes that stage faster. Every finding
is in OUT/gpu.json as soon as it is made. Each stage (tasks.py) is a process of its own with a time limit; the exit
status is 1 if one of them failed, was cut off or not reached. A goal that is missed fails nothing: it stays in the
table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this file's folder first; the package is importable from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from linattn._util.environment import device_slug
from linattn.bench.gpu.stages import DONE, Record, Stage, run_stages
from linattn.bench.gpu.tasks import ROOT, RUNS, StageRun
from linattn.errors import LinattnError, unknown_name

TOTAL_S = 530.0
PEERS = ROOT / "peers"
STAGES = (
    Stage("environment", "device, clocks, driver, versions, commit", 30),
    Stage("correctness", "the tests of the Triton kernels on this device", 150),
    Stage("fuzz", "random calls against the truth in float64", 90),
    Stage("limits", "copy bandwidth and matrix products", 30),
    Stage("direct", "direct quadratic form and softmax, beside PyTorch's", 75),
    Stage("chunked", "chunked quadratic form at 65536 tokens", 75),
    Stage("feature_map", "feature-map attention on six shapes", 60),
    Stage("crossover", "the length from which the chunked form is faster than any softmax", 90),
    Stage("decode", "one step of decoding", 30),
    Stage("host", "host time of a call", 30),
    Stage("million", "1,048,576 tokens", 45),
    Stage("flex", "beside FlexAttention", 75),
    Stage("peers", "beside retention and fla's rebased, if their wheels are in peers/", 60),
    Stage("fla", "beside fla on its own six shapes, if its wheel is in peers/", 120),
    Stage("sanitizer", "compute-sanitizer on small calls, if it is installed", 90),
    Stage("figures", "figures from the file", 30),
)


def main(argv: list[str] | None = None) -> int:
    """Run the stages, or, for `--stage`, one of them in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=_names, default=[s.name for s in STAGES], metavar="A,B", help="these stages")
    parser.add_argument("--missing", action="store_true", help="leave out what the file already holds")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, in Triton's interpreter")
    parser.add_argument("--out", type=Path, help="folder (bench/results/DEVICE; runs/gpu-rehearsal for a rehearsal)")
    parser.add_argument("--total", type=float, default=TOTAL_S, metavar="S", help="seconds for all (%(default)s)")
    parser.add_argument("--stage", choices=list(RUNS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    only_draws = ([args.stage] if args.stage else args.only) == ["figures"]
    if not (args.rehearse or only_draws) and not torch.cuda.is_available():
        print(
            f"make gpu: torch {torch.__version__} sees no CUDA device; REHEARSE=1 rehearses on the CPU", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if args.rehearse or not torch.cuda.is_available() else "cuda")
    out = args.out or (
        ROOT / "runs" / "gpu-rehearsal" if args.rehearse else ROOT / "bench" / "results" / device_slug(device)
    )
    if args.stage:
        return RUNS[args.stage](StageRun(device, out, args.rehearse, args.missing))
    return _run_all(args, out)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in RUNS:
            raise argparse.ArgumentTypeError(str(unknown_name("stage", name, RUNS)))
    return names


def _run_all(args: argparse.Namespace, out: Path) -> int:
    record = Record(out / "gpu.json")
    prepare_environment(args.rehearse)
    flags = [flag for flag, given in (("--rehearse", args.rehearse), ("--missing", args.missing)) if given]

    def command(stage: Stage) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), "--stage", stage.name, "--out", str(out), *flags]

    stages = [stage for stage in STAGES if stage.name in args.only]
    if args.missing:
        done = {name for name, found in record.section("stages").items() if found["state"] == DONE}
        stages = [stage for stage in stages if stage.name not in done]
    undone = run_stages(stages, command, record, total_s=args.total, say=lambda text: print(text, flush=True))
    print("\n" + summary(record))
    print(f"\nwritten: {record.path}" + (f"; not done: {', '.join(undone)}" if undone else ""))
    return 1 if undone else 0


def prepare_environment(rehearse: bool) -> None:
    """Let the stages, which inherit it, find the package, the peers and in a rehearsal the interpreter."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    wheels = sorted(PEERS.glob("*.whl")) if PEERS.is_dir() else []
    if wheels:
        # retention writes into its own package, so every run has a fresh copy in a folder of its own.
        target = ROOT / "runs" / "peers"
        shutil.rmtree(target, ignore_errors=True)
        options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target)]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)], check=False)
        print(
            f"peers: {', '.join(w.name for w in wheels)}"
            if done.returncode == 0
            else "peers: pip could not install them"
        )
        paths.append(str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONUNBUFFERED"] = "1"  # what a stage that is cut off has said is seen
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"


def summary(record: Record) -> str:
    """Format the goals as a table, and the stages that are not done."""
    lines = []
    for key, goal in record.section("goals").items():
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.3g}"
        stretch = "" if goal["stretch"] is None else f" (stretch {goal['stretch']:g})"
        met = {None: "-", True: "met", False: "MISSED"}[goal["met"]]
        sign = "<=" if goal["at_most"] else ">="
        lines.append(f"{met:7s} {measured:>13s} {sign} {goal['goal']:g}{stretch}  {key}")
    return "\n".join(lines) or "no goals measured"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LinattnError as error:
        print(f"make gpu: {re.sub(chr(10), ' ', str(error))}", file=sys.stderr)
        sys.exit(2)
