"""TorchRec's sharding planner: what a subclass needs of its search, and what its estimators take facts from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import DDR_MEM_BW, MIN_CW_DIM, kernel_bw_lookup
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator as EmbeddingPerfEstimator
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator as EmbeddingStorageEstimator
from torchrec.distributed.planner.shard_estimators import get_num_poolings
from torchrec.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    Partitioner,
    Proposer,
    ShardingOption,
    StorageReservation,
    Topology,
)
from torchrec.distributed.types import ModuleSharder

NARROWEST_COLUMN_SHARD: int = MIN_CW_DIM
"""Columns into which TorchRec cuts a table by default."""

HOST_MEMORY_BANDWIDTH: float = DDR_MEM_BW
"""That TorchRec assumes, bytes a ms."""


class SearchingPlanner(EmbeddingShardingPlanner):
    """TorchRec's planner, with the parts of its search that a subclass reads and replaces."""

    @property
    def topology(self) -> Topology:
        """The devices that are planned for."""
        return self._topology

    @property
    def batch_size(self) -> int:
        """Of each rank."""
        return int(self._batch_size)

    @property
    def partitioner(self) -> Partitioner:
        """Places the shards of a proposal on devices."""
        return self._partitioner

    @property
    def storage_reservation(self) -> StorageReservation:
        """Takes from the devices what is not for embedding shards."""
        return self._storage_reservation

    @property
    def best_plan(self) -> list[ShardingOption] | None:
        """The option of each table in the last plan, placed."""
        best: list[ShardingOption] | None = self._best_plan
        return best

    def forget_plan(self) -> None:
        """Let there be no :attr:`best_plan`, whatever the next search finds."""
        self._best_plan = None

    def propose_with(self, proposers: list[Proposer]) -> None:
        """Replace the proposers."""
        self._proposers = proposers

    def search_among(self, enumerator: Enumerator, constraints: dict[str, ParameterConstraints]) -> None:
        """Replace the search space, and the constraints that it was made with."""
        self._enumerator = enumerator
        self._constraints = constraints

    def search_space(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Every option of every table, with estimates."""
        options: list[ShardingOption] = self._enumerator.enumerate(module, sharders)
        return options

    def reserved_topology(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> Topology:
        """The devices less what is reserved on them."""
        reservation: Any = self._storage_reservation
        reserved: Topology = reservation.reserve(self._topology, self._batch_size, module, sharders, self._constraints)
        return reserved


def reserved_share(reservation: StorageReservation) -> float:
    """The share of a device's memory that a reservation takes; 0 where it does not go by a share."""
    share: float = getattr(reservation, "_percentage", 0)
    return share


def sharder_of_type(sharders: tuple[Any, ...], named_sharders: Mapping[str, Any]) -> Mapping[str, Any]:
    """The enumerator's sharders by module type: its only argument, whose name depends on TorchRec's release."""
    (by_type,) = (*sharders, *named_sharders.values())
    mapping: Mapping[str, Any] = by_type
    return mapping


def poolings_per_feature(option: ShardingOption, constraints: Mapping[str, ParameterConstraints] | None) -> list[float]:
    """How often each feature of an option's table is pooled for an example."""
    poolings: list[float] = get_num_poolings(constraints, option)
    return poolings


def device_memory_bandwidth(topology: Topology) -> float:
    """Of the memory in which a fused kernel has its rows, bytes a ms."""
    bandwidth: float = kernel_bw_lookup(
        topology.compute_device,
        EmbeddingComputeKernel.FUSED.value,
        topology.hbm_mem_bw,
        topology.ddr_mem_bw,
        topology.hbm_to_ddr_mem_bw,
    )
    return bandwidth


@contextmanager
def without_optimizer_state(option: ShardingOption) -> Iterator[None]:
    """Within this, TorchRec's estimators count no optimizer state: the tensor lacks that by which they know it."""
    tensor = option.tensor
    option._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    try:
        yield
    finally:
        option._tensor = tensor
