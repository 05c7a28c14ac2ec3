"""Long runs: train, interrupt, resume, spread over processes, track, compare.

Example:
    >>> import torch
    >>> from linattn.training import Trainer, TrainingConfig
    >>> model = torch.nn.Linear(2, 1)
    >>> loss = lambda: model(torch.ones(1, 2)).square().mean()
    >>> Trainer(model, lambda step: loss(), lambda: loss().item(), TrainingConfig(steps=20)).run()
    True
"""

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
