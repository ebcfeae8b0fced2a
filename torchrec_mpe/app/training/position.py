"""Where a phase of training stands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """``batch`` batches of epoch number ``epoch``, counted from 0, are behind the phase."""

    epoch: int = 0
    batch: int = 0
