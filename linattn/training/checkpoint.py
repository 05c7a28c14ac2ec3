"""The checkpoint file: written complete or not at all, read without running code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from linattn._util.files import atomic_file
from linattn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CHECKPOINT_FORMAT = 1
CHECKPOINT_NAME = "checkpoint.pt"
HISTORY_NAME = "history.jsonl"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint; a file there is replaced only by a complete new one.

    Args:
        path: the file; folders above it are made.
        content: tensors, numbers, strings, lists and dictionaries.

    Raises:
        CheckpointError: naming the file and the cause, such as a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:
        # A failed write within torch ends in a RuntimeError about torch's own source; the system's is its context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        earlier = describe_earlier("checkpoint", path)
        raise CheckpointError(f"the checkpoint {path} cannot be written: {cause}; {earlier}") from error


def describe_earlier(kind: str, path: Path) -> str:
    """Say in an error whether an earlier file is still there.

    Args:
        kind: "checkpoint" or "history".
        path: the file that could not be written.
    """
    return f"the previous {kind} is intact" if path.is_file() else "there is no earlier one"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of `write_checkpoint` onto the CPU. Only plain data is loaded, never code.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint {path}; accepted: a folder in which training was started before"
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        damaged = "it is damaged or not a checkpoint of linattn"
        cause = error.strerror or damaged if isinstance(error, OSError) else damaged
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {cause}; accepted: a complete file written by this trainer"
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        given = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"the checkpoint {path} has format {given!r}; accepted: {CHECKPOINT_FORMAT}")
    return content
