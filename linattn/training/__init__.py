"""Long runs: train, interrupt, resume, spread over processes, track, compare."""

from __future__ import annotations

from linattn.training.trainer import Record, Trainer, TrainingConfig, read_checkpoint, write_checkpoint

__all__ = ["Record", "Trainer", "TrainingConfig", "read_checkpoint", "write_checkpoint"]
