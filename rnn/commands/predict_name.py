"""`linattn names predict NAME`: the languages that a name reminds a trained model of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from linattn._util.tables import text_table
from linattn.errors import CheckpointError, refusal
from linattn.rnn.tasks.name_model import saved_classifier
from linattn.training.checkpoint import CHECKPOINT_NAME

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the names, --run and --top."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="a surname; several are answered one by one")
    parser.add_argument("--run", type=Path, default=Path("runs") / "names", help="folder of a training (%(default)s)")
    parser.add_argument("--top", type=int, default=3, help="languages to show (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the most probable languages of each name."""
    found = sorted(args.run.glob(f"seed-*/{CHECKPOINT_NAME}"))
    if not found:
        raise refusal(
            CheckpointError, "there is no trained model", given=args.run, accepted="a folder of `linattn train names`"
        )
    model, languages = saved_classifier(found[0])
    rows = [(name, language, p) for name in args.names for language, p in model.guesses(name, languages, args.top)]
    print(text_table(("name", "language", "probability"), rows))
    print("\nA guess from spelling, about a language and about no person: see the model card beside the run.")
    return 0
