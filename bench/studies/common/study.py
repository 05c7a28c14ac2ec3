"""Give studies claims with limits, and the files that they leave behind."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

import linattn
from linattn._util import argtypes, figures
from linattn._util.files import write_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

FIGURE_NAME = "figure.png"
RESULT_NAME = "result.json"
HOLDS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True)
class Claim:
    """A sentence that a measurement can break: it holds when `measured relation limit`.

    Example:
        >>> Claim("water boils above 99 C", measured=99.97, relation=">", limit=99.0).holds
        True
    """

    text: str
    measured: float
    relation: Literal["<=", ">=", "<", ">", "=="]
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the measured value keeps the limit."""
        return bool(HOLDS[self.relation](self.measured, self.limit))

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "BROKEN"
        return f"{verdict}: {self.text} ({self.measured:.4g}, claimed {self.relation} {self.limit:.4g})"


def add_common_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare the options that every study has."""
    parser.add_argument("--out", type=Path, default=Path("runs") / "studies" / name, help="folder (%(default)s)")
    parser.add_argument("--seed", type=argtypes.seed, default=0, help="of everything random (%(default)s)")


def require_matplotlib() -> None:
    """Raise MissingExtraError now rather than after the computation."""
    figures.require_matplotlib("studies", "drawing the figure of a study")


def finish(name: str, text: str, claims: Sequence[Claim], figure: Figure, args: argparse.Namespace) -> int:
    """Print the tables and the claims, save figure and JSON; return 0 when every claim holds, else 1.

    Raises:
        DataError: the folder cannot be written.
    """
    print(text, *map(str, claims), sep="\n")
    result = {
        "study": name,
        "seed": args.seed,
        "linattn": linattn.__version__,
        "torch": torch.__version__,
        "claims": [
            {
                "claim": claim.text,
                "measured": claim.measured,
                "relation": claim.relation,
                "limit": claim.limit,
                "holds": claim.holds,
            }
            for claim in claims
        ],
    }
    figures.save(figure, args.out / FIGURE_NAME)
    write_json(args.out / RESULT_NAME, result, indent=2)
    print(f"\n{args.out / FIGURE_NAME}, {args.out / RESULT_NAME}")
    return 0 if all(claim.holds for claim in claims) else 1
