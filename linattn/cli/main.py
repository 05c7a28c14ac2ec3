"""The `linattn` command.

A command is a module with two functions: `add_arguments(parser)` declares its options, `run(args)` does the work and
returns the exit status. The module is imported only when its command is called, so `linattn --help` needs no extra.

Exit status: 0 done, 2 wrong use or an error of this library (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, NamedTuple

import linattn
from linattn.errors import LinattnError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Command(NamedTuple):
    """Where a command lives and what it does, in one line."""

    module: str
    summary: str


COMMANDS = {
    "info": Command("linattn.cli.info", "what is installed here, what this machine can do, which backends are ready"),
    "explain": Command("linattn.cli.explain", "which backend and form a call would take, why, and at what cost"),
    "fuzz": Command("linattn.testing.fuzz", "try a backend on random calls, held against the truth in float64"),
    "kernels": Command(
        "linattn.bench.codegen.command", "compile the GPU kernels, without a GPU, and read their machine code"
    ),
    "crossover": Command(
        "linattn.bench.crossover.command", "measure from which length on the linear form is the faster one"
    ),
    "scaling": Command(
        "linattn.bench.machine.scaling", "measure how time and memory grow with the length, operation by operation"
    ),
    "roofline": Command(
        "linattn.bench.machine.roofline", "measure the machine's limits and each kernel's place below them"
    ),
    "peers": Command(
        "linattn.bench.peers.verify", "prove what other implementations compute, and time them beside ours"
    ),
    "report": Command(
        "linattn.bench.report.command", "one page of all results, the README's tables, and what became slower"
    ),
    "calibrate": Command(
        "linattn.bench.crossover.calibrate", "measure where the chunked form begins to pay, for later calls"
    ),
    "train lm": Command("linattn.lm.train", "train a character language model on a text file"),
    "train names": Command("linattn.rnn.commands.train_names", "learn from which language a surname comes"),
    "train running-average": Command(
        "linattn.rnn.commands.train_running_average", "recurrent networks learn a running mean"
    ),
    "names predict": Command(
        "linattn.rnn.commands.predict_name", "the languages that a surname reminds a trained model of"
    ),
    "generate": Command("linattn.lm.generate", "continue a text with a language model that was trained here"),
    "train ae": Command(
        "linattn.autoencoders.experiments.train_command", "train autoencoders: plain, denoising or masked"
    ),
    "probe": Command(
        "linattn.autoencoders.experiments.probe_command", "a linear classifier on the codes of trained autoencoders"
    ),
    "sweep ae": Command(
        "linattn.autoencoders.experiments.sweep", "autoencoders over latent sizes, depths and objectives"
    ),
    "sweep batching": Command(
        "linattn.autoencoders.experiments.batching", "autoencoders trained as one model, or one by one"
    ),
    "runs": Command(
        "linattn.training.compare_runs", "list training runs and compare their histories, in a table and a figure"
    ),
    "study scaling": Command("linattn.bench.studies.attention.scaling", "why scores are divided by sqrt(D)"),
    "study argmax": Command(
        "linattn.bench.studies.attention.argmax", "looking up the best key, and why it cannot learn"
    ),
    "study kernels": Command(
        "linattn.bench.studies.attention.kernels", "similarities that keep the denominator away from zero"
    ),
    "study maps": Command(
        "linattn.bench.studies.attention.maps", "how well feature maps stand in for softmax, by their number"
    ),
    "study recall": Command(
        "linattn.bench.studies.attention.recall", "looking things up in a context: accuracy against state size"
    ),
    "study lm": Command(
        "linattn.bench.studies.attention.lm", "character language models with each kernel, on texts of yours"
    ),
    "study karate": Command(
        "linattn.bench.studies.graphs.karate", "Zachary's karate club by graph convolution and by attention"
    ),
    "study accumulation": Command(
        "linattn.bench.studies.networks.accumulation", "micro-batches under BatchNorm and LayerNorm"
    ),
    "study gradients": Command(
        "linattn.bench.studies.networks.gradients", "how gradients vanish and explode through time"
    ),
    "study beam": Command(
        "linattn.bench.studies.networks.beam", "beam search: a worked example, what it misses, what it costs"
    ),
    "study pca": Command("linattn.bench.studies.networks.pca", "what a linear autoencoder learns, beside PCA"),
    "study decay": Command(
        "linattn.bench.studies.networks.decay", "weight decay makes a linear autoencoder orthonormal"
    ),
    "study conversion": Command(
        "linattn.bench.studies.attention.conversion", "a trained softmax model becomes a linear one"
    ),
    "study depth": Command("linattn.bench.studies.networks.depth", "plain and residual networks of 20 and 56 layers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `argv` defaults to the process's own arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except LinattnError as error:
        print(f"linattn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`linattn info | head`): keep the interpreter from complaining once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if words and words[0] == "--version":
        print(f"linattn {linattn.__version__}")
        return 0
    # A group of commands, such as `sweep`, is listed as the whole is.
    *group, last = words or ["--help"]
    members = {name: c for name, c in COMMANDS.items() if name.split() != group == name.split()[: len(group)]}
    if last in ("-h", "--help") and members:
        print(_overview(members))
        return 0 if words else 2
    name, rest = _split_command(words)
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(prog=f"linattn {name}", description=command.summary)
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(rest))
    return status


def _split_command(words: list[str]) -> tuple[str, list[str]]:
    """Take the command's name, one word or two, off the front."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    first = words[0]
    is_group = any(name.startswith(f"{first} ") for name in COMMANDS)
    raise unknown_name("command", " ".join(words[:2]) if is_group else first, COMMANDS)


def _overview(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    rows = "".join(f"  {name:<{width}}  {command.summary}\n" for name, command in commands.items())
    return (
        "usage: linattn COMMAND [options]\n"
        "       linattn --version\n\n"
        f"commands:\n{rows}\n"
        "linattn COMMAND --help lists a command's options."
    )
