"""TorchRec's step time estimate, with the work that the search and retrain phases and caches add."""

from collections.abc import Mapping
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology

from torchrec_mpe.distributed.planner.cache_load import cache_config, cache_load
from torchrec_mpe.distributed.planner.distinct_shards import distinct_shards
from torchrec_mpe.distributed.planner.lookups import lookups_per_feature
from torchrec_mpe.distributed.planner.optimizer_state import fused_optimizer
from torchrec_mpe.distributed.planner.prefetch_traffic import prefetch_traffic
from torchrec_mpe.distributed.planner.row_maps import row_map_bytes
from torchrec_mpe.distributed.planner.unpooled_rows import unpooled_rows
from torchrec_mpe.modules.embedding_bag_collection import MPEEmbeddingBagCollection, Phase
from torchrec_mpe.upstream.planner import EmbeddingPerfEstimator, device_memory_bandwidth, sharder_of_type


class MPEPerfEstimator(EmbeddingPerfEstimator):
    """Estimates the step time of shards, in milliseconds, with the work of quantizing rows added.

    Lookup and pooling are bound by memory, so what is added to TorchRec's forward and backward compute is the traffic
    of :func:`torchrec_mpe.distributed.planner.unpooled_rows.unpooled_rows` over the bandwidth of the device's memory::

        fwd_compute += forward_traffic / bandwidth        bytes / (bytes / ms)
        bwd_compute += backward_traffic / bandwidth

    A cached table (compute kernel ``customized_kernel``, for which TorchRec has no bandwidth and raises) is looked up
    and updated in slots, as a fused one on the device. Added is what its prefetch moves
    (:func:`.prefetch_traffic.prefetch_traffic`), each part over its memory's bandwidth::

        prefetch_compute = store traffic / (host link or device bandwidth) + slot traffic / device bandwidth

    Communication stays TorchRec's: what travels is pooled embeddings, as ever.

    Args:
        topology (Topology): devices and their bandwidths.
        constraints (Optional[Dict[str, ParameterConstraints]]): by table.
        phase (Optional[Phase]): that is planned for; each collection's own by default.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: dict[str, ParameterConstraints] | None = None,
        phase: Phase | None = None,
    ) -> None:
        super().__init__(topology, constraints)
        self.topology, self.constraints = topology, constraints
        self._phase = phase

    def estimate(self, sharding_options: list[ShardingOption], *sharders: Any, **named_sharders: Any) -> None:
        """Set the perf of every shard of the options.

        Args:
            sharding_options (List[ShardingOption]): to be estimated.
            sharders: the enumerator's mapping from module types to sharders, or what it knows of them.
        """
        by_type = sharder_of_type(sharders, named_sharders)
        reduced = [distinct_shards(option) for option in sharding_options]
        for option, _ in reduced:
            if cache_config(option) is not None:
                option.compute_kernel = EmbeddingComputeKernel.FUSED.value
        super().estimate([option for option, _ in reduced], by_type)
        for option, (estimated, like) in zip(sharding_options, reduced, strict=True):
            estimated.compute_kernel = option.compute_kernel
            self._add_quantization(estimated, by_type)
            self._add_prefetch(estimated, by_type)
            option.is_weighted = estimated.is_weighted
            for shard, kind in zip(option.shards, like, strict=True):
                shard.perf = estimated.shards[kind].perf

    def _add_quantization(self, option: ShardingOption, sharders: Mapping[str, Any]) -> None:
        collection = option.module[1]
        ours = isinstance(collection, MPEEmbeddingBagCollection)
        phase = (self._phase or collection.phase) if ours else Phase.PLAIN
        if phase is Phase.PLAIN:
            return
        topology, bandwidth = self.topology, device_memory_bandwidth(self.topology)
        map_bytes = row_map_bytes(collection, option.name, phase).device
        optimizer = fused_optimizer(option.tensor, sharders[option.module_type_key].fused_params)
        for shard in option.shards:
            rows, columns = shard.size
            lookups = lookups_per_feature(option, shard, self.constraints, topology.world_size)
            unpooled = unpooled_rows(
                lookups, rows, columns, map_bytes, topology.compute_device, option.compute_kernel, optimizer
            )
            shard.perf.fwd_compute += unpooled.forward_traffic / bandwidth
            shard.perf.bwd_compute += unpooled.backward_traffic / bandwidth

    def _add_prefetch(self, option: ShardingOption, sharders: Mapping[str, Any]) -> None:
        config = cache_config(option)
        if config is None:
            return
        topology, bandwidth = self.topology, device_memory_bandwidth(self.topology)
        over_link = config.location == "host" and topology.compute_device != "cpu"
        store_bandwidth = topology.hbm_to_ddr_mem_bw if over_link else bandwidth
        optimizer = fused_optimizer(option.tensor, sharders[option.module_type_key].fused_params)
        for shard in option.shards:
            load = cache_load(option, shard, config, self.constraints, topology.world_size)
            moved = prefetch_traffic(option, shard, config, load, optimizer)
            shard.perf.prefetch_compute += moved.store / store_bandwidth + moved.slots / bandwidth
