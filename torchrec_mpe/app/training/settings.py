"""How a model is trained: what its result depends on, and what it does not."""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torchrec.distributed.types import ShardingType

from torchrec_mpe.app.models import ModelKind
from torchrec_mpe.modules.search_config import Grouping, Penalty, SearchConfig
from torchrec_mpe.precision.row_initialization import RowInitialization

SHARDING_TYPES = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)
"""What the planner chooses from by default: the sharding types that run on CPU and on CUDA, fused."""


@dataclass(frozen=True)
class Settings:
    """What a result depends on, by the options' names.

    Attributes:
        seed (int): of the initial rows, the dense network and the rows' order.
        model (str): "dlrm" or "dnn".
        dim (int): embedding dimension D.
        epochs (int): passes over the training rows in each phase.
        resets (int): how often the rows go back to their initial values: there are ``resets + 1`` phases, the first of
            a search being the search.
        batch_size (int): rows a step and rank.
        penalty (float): lambda of a search.
        penalty_kind (str): "bits" or "paper".
        grouping (str): "log_rank" or "paper".
    """

    seed: int = 0
    model: ModelKind = "dnn"
    dim: int = 16
    epochs: int = 1
    resets: int = 3
    batch_size: int = 512
    penalty: float = SearchConfig.penalty_weight
    penalty_kind: Penalty = SearchConfig.penalty
    grouping: Grouping = SearchConfig.grouping

    @property
    def search_config(self) -> SearchConfig:
        """The settings of the search phase."""
        return SearchConfig(
            grouping=self.grouping,
            penalty=self.penalty_kind,
            penalty_weight=self.penalty,
            initialization=RowInitialization(self.seed),
        )


@dataclass(frozen=True)
class RunSettings:
    """How a job runs, which its result does not depend on but for rounding.

    Attributes:
        device (torch.device): of this rank.
        timeout (timedelta): how long a rank waits for the others.
        checkpoint_every (int): steps between checkpoints.
        checkpoint_asynchronously (bool): write them while training goes on, from a copy in host memory.
        sharding_types (tuple[str, ...]): values of TorchRec's ShardingType that the planner may choose.
        progress (bool): show progress bars.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: timedelta = timedelta(seconds=600)
    checkpoint_every: int = 1000
    checkpoint_asynchronously: bool = False
    sharding_types: tuple[str, ...] = SHARDING_TYPES
    progress: bool = False
