"""Checkpoints inside a phase of training, every so many steps and after each epoch, and going on from one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.distributed.checkpoint.checkpoints import Checkpoints
from torchrec_mpe.errors import UserError
from torchrec_mpe.precision.plan import PrecisionPlan


@dataclass(frozen=True)
class Position:
    """``batch`` batches of epoch number ``epoch``, counted from 0, are behind the phase."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class PhaseCheckpoints:
    """Where one phase of a job saves its checkpoints, and which one it goes on from.

    Attributes:
        checkpoints (Checkpoints): the folder, of all phases of the job.
        phase (int): number of the phase in the job; a checkpoint of another phase is not this one's to go on from.
        first_step (int): of the phase, counted over the phases that share the folder.
        every (int): steps between checkpoints; one more follows each epoch.
        found (Optional[Checkpoint]): what to go on from, of this phase.
        counts (Optional[Mapping[str, Tensor]]): what the search was prepared with.
        plan (Optional[PrecisionPlan]): what retraining was prepared with.
        asynchronous (bool): write while training goes on, from a copy in host memory.
    """

    checkpoints: Checkpoints
    phase: int
    first_step: int
    every: int
    found: Checkpoint | None = None
    counts: Mapping[str, Tensor] | None = None
    plan: PrecisionPlan | None = None
    asynchronous: bool = False

    def resume(
        self, model: DistributedModelParallel, optimizer: torch.optim.Optimizer, schedule: LRScheduler
    ) -> Position:
        """Load what the phase goes on from, if anything; returns where that stands.

        Raises:
            UserError: if it was saved in the middle of an epoch by another number of ranks, whose batches were others.
        """
        if self.found is None:
            return Position()
        position = Position(self.found.position["epoch"], self.found.position["batch"])
        if position.batch and self.found.world_size != dist.get_world_size():
            raise UserError(
                f"{self.found.path} was saved in the middle of an epoch on {self.found.world_size} ranks, and this job "
                f"has {dist.get_world_size()}: go on with as many ranks as before until the epoch is complete"
            )
        if position == Position():  # saved before the phase's first step: no optimizer has any state
            self.checkpoints.load(model, None, self.found, optimizer_state=False)
        else:
            self.checkpoints.load(model, optimizer, self.found, extra={"schedule": schedule})
        return position

    def due(self, step: int) -> bool:
        """Whether to save after the phase's ``step``-th step."""
        return step % self.every == 0

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        step: int,
        position: Position,
    ) -> None:
        """Save what the phase came to after its ``step``-th step."""
        self.checkpoints.save(
            model,
            optimizer,
            step=self.first_step + step,
            position={"phase": self.phase, "epoch": position.epoch, "batch": position.batch},
            counts=self.counts,
            plan=self.plan,
            extra={"schedule": schedule},
            asynchronous=self.asynchronous,
        )
