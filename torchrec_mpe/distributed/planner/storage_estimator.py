"""TorchRec's storage estimate, with what the search and retrain phases add."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torchrec.distributed.planner.types import ParameterConstraints, ShardEstimator, ShardingOption, Topology
from torchrec.distributed.types import PipelineType

from torchrec_mpe.distributed.planner.cache_load import cache_config
from torchrec_mpe.distributed.planner.cached_shard_bytes import bytes_of_cached_shard, wide_rows_of_shard
from torchrec_mpe.distributed.planner.distinct_shards import distinct_shards
from torchrec_mpe.distributed.planner.optimizer_state import fused_optimizer
from torchrec_mpe.distributed.planner.shard_bytes import ShardBytes, bytes_of_shards
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.upstream.planner import EmbeddingStorageEstimator, sharder_of_type, without_optimizer_state


class MPEStorageEstimator(ShardEstimator):
    """Estimates the memory of shards of MPEEmbeddingBagCollections; other modules' as TorchRec does.

    To TorchRec's rows, ids and pooled embeddings it adds row maps, unpooled rows and their gradients in the search and
    retrain phases, and the optimizer state that ``fused_params`` ask for, which TorchRec leaves out. A step is taken at
    its peak, the embedding backward: every shard's rows are held until its own, so for all shards of a rank the sum of
    the estimates is an upper bound of what several TBEs, one backward after the other, hold at a time. Rows and
    optimizer state are exact.

    TorchRec counts a cached table (compute kernel ``customized_kernel``) as float32 rows on the device. Here it takes
    what :func:`torchrec_mpe.distributed.planner.cached_shard_bytes.bytes_of_cached_shard` says.

    Args:
        topology (Topology): devices.
        constraints (Optional[Dict[str, ParameterConstraints]]): by table, for batch sizes and pooling factors.
        pipeline_type (PipelineType): of the training pipeline, for the ids of batches in flight.
        phase (Optional[Phase]): that is planned for; each collection's own by default. The search phase holds the most.
        count_lookups (bool): lookups of each row are counted during training.

    Example::

        planner = MPEShardingPlanner(topology, batch_size=512)    # has one already
        enumerator = EmbeddingEnumerator(
            topology, batch_size=512, estimator=[MPEPerfEstimator(topology), MPEStorageEstimator(topology)]
        )
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        pipeline_type: PipelineType = PipelineType.NONE,
        phase: Phase | None = None,
        count_lookups: bool = False,
    ) -> None:
        self._topology = topology
        self._constraints = constraints
        self._pipeline_type = pipeline_type
        self._phase = phase
        self._count_lookups = count_lookups
        self._sharders: Mapping[str, Any] = {}
        # In the plain phase the peak is the dense network's, as TorchRec assumes; in the others the embedding backward.
        self._estimators = {
            plain: EmbeddingStorageEstimator(
                topology, constraints, pipeline_type, run_embedding_at_peak_memory=not plain
            )
            for plain in (True, False)
        }

    def estimate(self, sharding_options: list[ShardingOption], *sharders: Any, **named_sharders: Any) -> None:
        """Set the storage of every shard of the options.

        Args:
            sharding_options (List[ShardingOption]): to be estimated.
            sharders: the enumerator's mapping from module types to sharders, or what it knows of them.

        Raises:
            ValueError: naming the table, for an optimizer whose state is not known.
        """
        self._sharders = sharder_of_type(sharders, named_sharders)
        for option in sharding_options:
            kinds, like = self._bytes_by_kind(option)
            storages = [held.storage(self._topology.compute_device) for held in kinds]
            for shard, kind in zip(option.shards, like, strict=True):
                shard.storage = storages[kind]

    def shard_bytes(self, option: ShardingOption) -> list[ShardBytes]:
        """The bytes of each shard of an option by kind; of other modules than ours all under ``inputs_outputs``.

        Args:
            option (ShardingOption): of any module of the last :meth:`estimate`.
        """
        kinds, like = self._bytes_by_kind(option)
        return [kinds[kind] for kind in like]

    def _bytes_by_kind(self, option: ShardingOption) -> tuple[list[ShardBytes], list[int]]:
        """The bytes of each kind of shard, and the kind of every shard."""
        collection = option.module[1]
        ours = isinstance(collection, MPEEmbeddingBagCollection)
        plain = not ours or (self._phase or collection.phase) is Phase.PLAIN
        config = cache_config(option)
        reduced, like = distinct_shards(option, None if config is None else partial(wide_rows_of_shard, option))
        with without_optimizer_state(reduced) if ours else nullcontext():  # it is counted here
            self._estimators[plain].estimate([reduced], self._sharders)
        storages = [shard.storage for shard in reduced.shards]
        if not ours:
            return [ShardBytes(inputs_outputs=s.hbm, frequency_order=s.ddr, ssd=s.ssd) for s in storages], like
        fused_params = self._sharders[option.module_type_key].fused_params
        topology, constraints, count = self._topology, self._constraints, self._count_lookups
        found = bytes_of_shards(reduced, storages, topology, constraints, fused_params, self._phase, count)
        if config is not None:
            optimizer = fused_optimizer(option.tensor, fused_params)
            found = [
                bytes_of_cached_shard(
                    reduced,
                    shard,
                    config,
                    held,
                    optimizer,
                    constraints,
                    topology.world_size,
                    topology.compute_device,
                    self._pipeline_type,
                )
                for shard, held in zip(reduced.shards, found, strict=True)
            ]
        return found, like
