"""Long runs: train, interrupt, resume, spread over processes, track, compare."""

from __future__ import annotations

from linattn.training.checkpoint import read_checkpoint, write_checkpoint
from linattn.training.tracking import TensorBoardTracker, Tracker, WandbTracker
from linattn.training.trainer import Record, Trainer, TrainingConfig

__all__ = [
    "Record",
    "TensorBoardTracker",
    "Tracker",
    "Trainer",
    "TrainingConfig",
    "WandbTracker",
    "read_checkpoint",
    "write_checkpoint",
]
