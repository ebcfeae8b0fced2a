"""Checkpoints of training in every phase."""

from torchrec_mpe.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoint", "Checkpoints"]
