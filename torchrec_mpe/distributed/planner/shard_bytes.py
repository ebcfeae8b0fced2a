"""The memory of one shard in training, by what it holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Storage, Topology
from torchrec.distributed.types import ShardingType

from torchrec_mpe.distributed.planner.lookups import lookups_per_feature
from torchrec_mpe.distributed.planner.optimizer_state import fused_optimizer, state_bytes_per_row
from torchrec_mpe.distributed.planner.row_maps import row_map_bytes
from torchrec_mpe.distributed.planner.unpooled_rows import UnpooledRows, unpooled_rows
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.upstream.optimizers import optimizer_in_backward

_ON_HOST = (EmbeddingComputeKernel.FUSED_UVM.value, EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
_DENSE = EmbeddingComputeKernel.DENSE.value
_WHOLE = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value, _DENSE, *_ON_HOST)
_WEIGHT_BYTES = 4  # float32 per-sample weights
_COUNT_BYTES = 8  # int64
# Copies of a dense kernel's weights in backward: DDP's bucket and the gradient; in the prepared phases, whose rows are
# gathered from each table's part of the weights, also the tables' own gradients.
_DENSE_GRADIENTS = {Phase.PLAIN: 2, Phase.SEARCH: 3, Phase.RETRAIN: 3}


@dataclass(frozen=True)
class ShardBytes:
    """Bytes of one shard on its rank, at the peak of a training step.

    Attributes:
        rows (int): the weights; in host memory for FUSED_UVM and FUSED_UVM_CACHING.
        optimizer_state (int): of the fused optimizer, where the rows are (with ``enforce_hbm`` on the device); of a
            cached table that of its slots.
        row_map (int): feature group or candidate of each row.
        row_counts (int): how often each row was looked up, if that is counted during training.
        inputs_outputs (int): ids and pooled embeddings as TorchRec estimates them; for FUSED_UVM_CACHING its cache too.
        activations (int): unpooled rows and index tensors saved for backward.
        gradients (int): of the unpooled rows; for dense kernels of the weights too, with DDP's bucket.
        frequency_order (int): in host memory.
        store (int): of a cached table, its rows and their optimizer state in low precision.
        cache (int): of a cached table, the cache's float32 rows.
        spill (int): of a cached table, the spill area's float32 rows.
        directory (int): of a cached table, which rows its slots hold, and how often rows were looked up (LFU).
        rows_on_host (bool): rows in host memory.
        state_on_host (bool): optimizer state in host memory.
        store_on_host (bool): backing store in host memory.
        ssd (int): bytes on SSD, of key-value kernels.
    """

    rows: int = 0
    optimizer_state: int = 0
    row_map: int = 0
    row_counts: int = 0
    inputs_outputs: int = 0
    activations: int = 0
    gradients: int = 0
    frequency_order: int = 0
    store: int = 0
    cache: int = 0
    spill: int = 0
    directory: int = 0
    rows_on_host: bool = False
    state_on_host: bool = False
    store_on_host: bool = False
    ssd: int = 0

    @property
    def host(self) -> int:
        """Bytes in host memory for which there is no room on the device."""
        rows = self.rows if self.rows_on_host else 0
        state = self.optimizer_state if self.state_on_host else 0
        return rows + self.frequency_order + state + (self.store if self.store_on_host else 0)

    @property
    def device(self) -> int:
        """Bytes on the device."""
        rows = 0 if self.rows_on_host else self.rows
        state = 0 if self.state_on_host else self.optimizer_state
        store = 0 if self.store_on_host else self.store
        cached = store + self.cache + self.spill + self.directory
        held = self.row_map + self.row_counts + self.inputs_outputs + self.activations + self.gradients
        return rows + state + cached + held

    @property
    def total(self) -> int:
        """Bytes on device and host."""
        return self.device + self.host

    def storage(self, compute_device: str) -> Storage:
        """As TorchRec's planner counts it: all in DDR if the device is the CPU."""
        if compute_device == "cpu":
            return Storage(hbm=0, ddr=self.total, ssd=self.ssd)
        return Storage(hbm=self.device, ddr=self.host, ssd=self.ssd)

    def by_kind(self) -> dict[str, int]:
        """The bytes by attribute name."""
        kinds = (f.name for f in fields(self) if f.type in (int, "int") and f.name != "ssd")
        return {name: getattr(self, name) for name in kinds}


def bytes_of_shards(
    option: ShardingOption,
    torchrec: Sequence[Storage],
    topology: Topology,
    constraints: Mapping[str, ParameterConstraints] | None,
    fused_params: Mapping[str, Any] | None,
    phase: Phase | None = None,
    count_lookups: bool = False,
) -> list[ShardBytes]:
    """The memory of each shard of a table of an MPEEmbeddingBagCollection, of a cached one as if it were not cached.

    Args:
        option (ShardingOption): one way of sharding the table.
        torchrec (Sequence[Storage]): of its shards, as TorchRec's estimator has them without optimizer state.
        topology (Topology): devices.
        constraints (Optional[Mapping[str, ParameterConstraints]]): by table.
        fused_params (Optional[Mapping[str, Any]]): of the sharder.
        phase (Optional[Phase]): planned for; the collection's own by default.
        count_lookups (bool): lookups of each row are counted during training, in int64.

    Raises:
        ValueError: for an optimizer whose state is not known, naming the table.
    """
    collection: MPEEmbeddingBagCollection = option.module[1]
    phase = phase or collection.phase
    kernel: str = option.compute_kernel
    dense, on_host = kernel == _DENSE, kernel in _ON_HOST
    on_cpu = topology.compute_device == "cpu"
    optimizer = fused_optimizer(option.tensor, fused_params)
    # A dense kernel's optimizer is the user's own, known only where it was applied in backward.
    has_state = kernel in _WHOLE and (not dense or optimizer_in_backward(option.tensor) is not None)
    per_row = row_map_bytes(collection, option.name, phase)
    replicated = option.sharding_type == ShardingType.DATA_PARALLEL.value
    found: list[ShardBytes] = []
    for number, (shard, estimated) in enumerate(zip(option.shards, torchrec, strict=True)):
        rows, columns = shard.size
        weights = rows * columns * option.tensor.element_size() if kernel in _WHOLE else 0
        lookups = lookups_per_feature(option, shard, constraints, topology.world_size)
        in_estimate = weights if on_cpu or not on_host else 0
        inputs_outputs = max(0, (estimated.ddr if on_cpu else estimated.hbm) - in_estimate)
        if collection.is_weighted():
            inputs_outputs += math.ceil(sum(lookups) * _WEIGHT_BYTES)
        unpooled = UnpooledRows()
        if phase is not Phase.PLAIN:
            unpooled = unpooled_rows(lookups, rows, columns, per_row.device, topology.compute_device, kernel, optimizer)
        gradients = unpooled.gradients
        if dense:
            # By the time of all these copies but DDP's bucket, the unpooled rows are gone.
            copies = _DENSE_GRADIENTS[phase] - 1
            gradients = weights + max(copies * weights - unpooled.activations, gradients)
        # Ranks and counts are kept once for each row: with the first column shard, and the ranks of data-parallel
        # copies on rank 0.
        first_columns = shard.offset[1] == 0
        found.append(
            ShardBytes(
                rows=weights,
                optimizer_state=rows * state_bytes_per_row(optimizer, columns, option.name) if has_state else 0,
                row_map=rows * per_row.device,
                row_counts=rows * _COUNT_BYTES if count_lookups and first_columns else 0,
                inputs_outputs=inputs_outputs,
                activations=unpooled.activations,
                gradients=gradients,
                frequency_order=rows * per_row.host if first_columns and not (replicated and number) else 0,
                rows_on_host=on_host,
                state_on_host=on_host and not option.enforce_hbm,
                ssd=estimated.ssd,
            )
        )
    return found
