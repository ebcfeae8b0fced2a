"""CachedEmbeddingBagCollection sharded by TorchRec, its rows in low precision with full-precision caches."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingInfo
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.distributed.cached_embedding_kernel import CACHED_KERNEL, CachedEmbeddingBag
from torchrec_mpe.distributed.cached_state import CachedShard, CachedState, wide_rows_digest
from torchrec_mpe.distributed.embeddingbag import (
    QUANTIZED_KERNELS,
    MPEEmbeddingBagCollectionSharder,
    ShardedMPEEmbeddingBagCollection,
)
from torchrec_mpe.distributed.pooled_lookup import MPEPooledLookup
from torchrec_mpe.distributed.row_shard import RowShard, shard_offsets
from torchrec_mpe.distributed.sum_over_ranks import sum_over_ranks_
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.precision.frequency_counter import FrequencyCounter
from torchrec_mpe.precision.row_initialization import RowInitialization

_ROWS_PER_CHUNK = 1 << 16
_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value


class ShardedCachedEmbeddingBagCollection(ShardedMPEEmbeddingBagCollection):
    """A ShardedMPEEmbeddingBagCollection whose tables may live in INT8 or INT4, with a cache of fp32 rows.

    Tables with the compute kernel ``customized_kernel`` are cached, each shard with a store and a cache of its own on
    its rank; the others are TorchRec's. Rows move into the cache before a lookup: with PrefetchTrainPipelineSparseDist
    one batch ahead, otherwise in the lookup itself.

    The state dict has in place of a cached table's ``weight`` its quantized rows with their optimizer state: see
    :class:`torchrec_mpe.distributed.cached_state.CachedState`. Making it writes all cached rows back and empties the
    caches. A ``weight`` of fp32 rows of a whole table may be loaded as well. The rows in a state dict are the stores
    themselves, to which loading any state dict first writes cached rows back: one that torch.distributed.checkpoint
    is to load into must be made after the last training step, when no output waits for its backward.

    Args:
        module (CachedEmbeddingBagCollection): the unsharded collection.
        table_name_to_parameter_sharding, env, fused_params, device, kwargs: as ShardedEmbeddingBagCollection.

    Raises:
        ValueError: naming the table, for one that has a cache and is data-parallel, or has the cached kernel and no
            CacheConfig; and as ShardedMPEEmbeddingBagCollection.
        NotImplementedError: under DMPCollection, which averages the TBEs of replicas.
    """

    quantized_kernels = (*QUANTIZED_KERNELS, CACHED_KERNEL.value)

    def __init__(
        self,
        module: CachedEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(env, ShardingEnv2D) and module.cache_configs:
            raise NotImplementedError(
                f"tables {', '.join(module.cache_configs)} are cached, whose replicas hold different rows in their "
                "slots: DMPCollection would average them; use DistributedModelParallel"
            )
        for table in module.embedding_bag_configs():
            _refuse(table.name, module.cache_configs, table_name_to_parameter_sharding[table.name])
        # Before TorchRec makes the lookups.
        self.cache_configs: dict[str, CacheConfig] = dict(module.cache_configs)
        self._wide_rows = module.wide_rows
        self._state: CachedState | None = None
        super().__init__(module, table_name_to_parameter_sharding, env, fused_params, device, **kwargs)
        del self._wide_rows  # has the whole plan

    @classmethod
    def create_grouped_sharding_infos(
        cls,
        module: CachedEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        prefix: str,
        fused_params: dict[str, Any] | None,
        suffix: str | None = "weight",
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """The sharding infos, for TBEs whose cached tables store optimizer state and round alike."""
        grouped = super().create_grouped_sharding_infos(
            module, table_name_to_parameter_sharding, prefix, fused_params, suffix
        )
        for info in (info for infos in grouped.values() for info in infos):
            if info.param_sharding.compute_kernel == CACHED_KERNEL.value:
                cache = module.cache_configs[info.embedding_config.name]
                params = info.fused_params or {}
                key = f"{params.get('_batch_key', '')}_{cache.optimizer_state_dtype}_{cache.stochastic_rounding}"
                info.fused_params = {**params, "_batch_key": key}
        return grouped

    def create_lookup(self, sharding_type: str, sharding: Any, **cached: Any) -> MPEPooledLookup:
        """The lookup of all tables of one sharding type, with the cached ones among them."""
        return super().create_lookup(sharding_type, sharding, caches=self.cache_configs, wide_rows=self._wide_rows)

    def cached_tables(self) -> list[str]:
        """The names of the tables that are cached."""
        plan = self.module_sharding_plan.items()
        return [table for table, sharding in plan if sharding.compute_kernel == CACHED_KERNEL.value]

    def cached_shards(self) -> Iterator[CachedShard]:
        """This rank's shards of cached tables."""
        for kernel in self.kernels():
            if isinstance(kernel, CachedEmbeddingBag):
                for t, table in enumerate(kernel.config.embedding_tables):
                    row, column = shard_offsets(table)
                    yield CachedShard(table.name, row, column, table.local_rows, table.local_cols, kernel.emb_module, t)

    def local_shards(self) -> Iterator[tuple[str, int, int, Tensor]]:
        """This rank's shards of the tables that are not cached: a cached table's rows are in no one tensor."""
        cached = set(self.cached_tables())
        return (shard for shard in super().local_shards() if shard[0] not in cached)

    def shards(self) -> Iterator[RowShard]:
        """This rank's shards, cached or not, to read rows from wherever they are."""
        yield from super().shards()
        yield from self.cached_shards()

    def cache_statistics(self, *, across_ranks: bool = False) -> dict[str, CacheStatistics]:
        """The caches' counters by table, added up over its shards.

        Args:
            across_ranks (bool): shards of all ranks, which all call it; by default this rank's.
        """
        tables = self.cached_tables()
        if not tables:
            return {}
        sums = dict.fromkeys(tables, CacheStatistics())
        for shard in self.cached_shards():
            sums[shard.name] += shard.emb_module.cache_statistics()[shard.table]
        if not across_ranks:
            return sums
        counters = torch.tensor([list(vars(sums[table]).values()) for table in tables]).view(len(tables), -1)
        sum_over_ranks_(counters, self.process_group, self.device)
        return {table: CacheStatistics.of(row) for table, row in zip(tables, counters, strict=True)}

    def lookup_counts(self) -> FrequencyCounter:
        """How often the rows of cached tables were looked up, as their LFU caches count it: recent lookups count more.

        A collective: every rank gets the counts of whole tables, 8 bytes a row of host memory.

        Returns:
            FrequencyCounter: for prepare_search_ or precision_from_frequencies.

        Raises:
            ValueError: if a table's cache is LRU, which counts no rows.
        """
        # A rank without a shard must not wait for one that raises.
        for table in self.cached_tables():
            if self.cache_configs[table].algorithm.name != "LFU":
                raise ValueError(f"table {table} has an LRU cache, which counts no rows: use CacheAlgorithm.LFU")
        rows = {table.name: table.num_embeddings for table in self.embedding_bag_configs()}
        counts = {table: torch.zeros(rows[table], dtype=torch.int64) for table in self.cached_tables()}
        for shard in self.cached_shards():
            if shard.first_column == 0:  # column shards count the same lookups
                part = counts[shard.name][shard.first_row : shard.first_row + shard.rows]
                part.copy_(shard.emb_module.lookup_counts(shard.table)[: shard.rows])
        for table in self.cached_tables():
            sum_over_ranks_(counts[table], self.process_group, self.device)
        return FrequencyCounter.from_counts(counts)

    def reset_rows(self, initialization: RowInitialization) -> None:
        """Write every local row's initial value, and clear the fused optimizers' state; cached tables in chunks."""
        super().reset_rows(initialization)
        for shard in self.cached_shards():
            for start in range(0, shard.rows, _ROWS_PER_CHUNK):
                values, first_row = self._chunk(shard, start), shard.first_row + start
                shard.write(start, initialization.fill_(values, shard.name, first_row, shard.first_column))
            shard.emb_module.set_optimizer_step(0)

    def reset_parameters(self) -> None:
        """TorchRec's initialization, of cached tables in chunks; or in a prepared phase that phase's initial rows."""
        if getattr(self, "row_initialization", None) is not None:
            super().reset_parameters()
            return
        # TorchRec looks for a parameter that holds the rows.
        init_fn: dict[str, Any] = {config.name: config.init_fn for config in self.embedding_bag_configs()}
        self.reset_tables(init_fn.keys() - set(self.cached_tables()))
        for shard in self.cached_shards():
            for start in range(0, shard.rows, _ROWS_PER_CHUNK):
                values = self._chunk(shard, start)
                init_fn[shard.name](values)
                shard.write(start, values)

    def _chunk(self, shard: CachedShard, start: int) -> Tensor:
        return torch.empty(min(_ROWS_PER_CHUNK, shard.rows - start), shard.columns, device=self.device)

    def update_shards(self, *args: Any, **kwargs: Any) -> None:
        """Refused: TorchRec moves rows that are parameters.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"tables {', '.join(self.cached_tables())} are cached, whose rows cannot be moved in a running job: save a "
            "checkpoint and load it under the new sharding"
        )

    # State dicts.

    def prepare_state_dict(self) -> None:
        """Make the stores' tensors and let state dicts have them."""
        found = {table: self._wide_rows_digest(table) for table in self.cached_tables()}
        wide_rows = {table: digest for table, digest in found.items() if digest is not None}
        self._state = CachedState(self.cached_shards(), self.process_group, wide_rows)
        self.register_state_dict_post_hook(_add_stores)

    def take_from_state_dict(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> None:
        """Take the cached tables' stores, or fp32 rows of whole tables, out of a state dict that is being loaded.

        A table is loaded with all that it has or not at all, and nothing is loaded unless everything fits.
        """
        prefix_of_tables = f"{prefix}embedding_bags."
        assert self._state is not None
        # Tables that are not loaded keep their rows, which may be in a cache that is emptied for another table.
        self._state.flush()
        weights: dict[str, Tensor] = {}
        stores: dict[str, dict[str, Any]] = {}
        for table in self.cached_tables():
            weight = state_dict.pop(f"{prefix_of_tables}{table}.weight", None)
            found = {name: state_dict.pop(f"{prefix_of_tables}{name}", None) for name in self._state.names(table)}
            if weight is not None:
                weights[table] = weight
            elif any(tensor is None for tensor in found.values()):
                missing_keys += [f"{prefix_of_tables}{name}" for name in found]
            else:
                stores[table] = found
        self._check_weights(weights)
        self._state.check(stores)
        for table, weight in weights.items():
            self._load_rows(table, weight)
        self._state.load(stores)

    def _wide_rows_digest(self, table: str) -> int | None:
        return wide_rows_digest(self._wide_rows, table, self.config_of(table).num_embeddings)

    def wide_rows_digest(self, table: str) -> int | None:
        """What tells which rows of a cached table are stored in 8 bits; None if all rows have equally many."""
        assert self._state is not None
        return self._state.wide_rows.get(table)

    def _check_weights(self, weights: dict[str, Tensor]) -> None:
        for table, weight in weights.items():
            if type(weight) is not Tensor and not isinstance(weight, nn.Parameter):
                raise ValueError(
                    f"table {table} is cached and cannot load fp32 rows that are sharded: give its whole weight, or "
                    "the rows4 and rows8 of a cached table"
                )
            config = self.config_of(table)
            if tuple(weight.shape) != (config.num_embeddings, config.embedding_dim):
                raise ValueError(
                    f"table {table} has {config.num_embeddings} rows of {config.embedding_dim} columns, its weight in "
                    f"the state dict has shape {list(weight.shape)}"
                )

    def _load_rows(self, table: str, weight: Tensor) -> None:
        for shard in self.cached_shards():
            if shard.name == table:
                for start in range(0, shard.rows, _ROWS_PER_CHUNK):
                    first = shard.first_row + start
                    values = weight[first : min(first + _ROWS_PER_CHUNK, shard.first_row + shard.rows)]
                    columns = slice(shard.first_column, shard.first_column + shard.columns)
                    shard.write(start, values[:, columns].to(self.device).contiguous())

    @property
    def unsharded_module_type(self) -> type[CachedEmbeddingBagCollection]:
        return CachedEmbeddingBagCollection


def _add_stores(
    module: ShardedCachedEmbeddingBagCollection, destination: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """The state dict hook; the pre-hook has flushed."""
    assert module._state is not None
    for name, tensor in module._state.tensors().items():
        destination[f"{prefix}embedding_bags.{name}"] = tensor


def _refuse(table: str, caches: dict[str, CacheConfig], sharding: ParameterSharding) -> None:
    if table in caches and sharding.sharding_type == _DATA_PARALLEL:
        raise ValueError(
            f"table {table} has a cache and is data-parallel, where every rank would round its copy of the rows for "
            "itself; use another sharding type, or give the table no CacheConfig"
        )
    if table not in caches and sharding.compute_kernel == CACHED_KERNEL.value:
        raise ValueError(f"table {table} has the compute kernel {CACHED_KERNEL.value} and no CacheConfig")


class CachedEmbeddingBagCollectionSharder(MPEEmbeddingBagCollectionSharder):
    """Shards CachedEmbeddingBagCollection; arguments as TorchRec's EmbeddingBagCollectionSharder.

    The kernel of cached tables is ``customized_kernel``, which TorchRec's planner has no estimates for: the
    MPEShardingPlanner chooses it for the tables that have a CacheConfig.
    """

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """The cached kernel first, and TorchRec's for tables without a CacheConfig."""
        kernels: list[str] = super().compute_kernels(sharding_type, compute_device_type)
        return kernels if sharding_type == _DATA_PARALLEL else [CACHED_KERNEL.value, *kernels]

    @property
    def module_type(self) -> type[CachedEmbeddingBagCollection]:
        return CachedEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedCachedEmbeddingBagCollection]:
        return ShardedCachedEmbeddingBagCollection
