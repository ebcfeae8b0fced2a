"""What a step's lookups ask of the cache of one shard: rows that miss, and rows that find no slot."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.planner.lookups import lookups_per_feature
from torchrec_mpe.distributed.planner.zipf_lookups import lookups_that_fill, zipf_lookups
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection
from torchrec_mpe.ops.cache_tensors import WAYS

CUSTOMIZED_KERNEL = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value


def cache_config(option: ShardingOption) -> CacheConfig | None:
    """The cache with which an option shards its table; None if it is not cached."""
    collection = option.module[1]
    if option.compute_kernel != CUSTOMIZED_KERNEL or not isinstance(collection, CachedEmbeddingBagCollection):
        return None
    return collection.cache_configs.get(option.name)


def cached_tables(module: nn.Module) -> set[str]:
    """The tables of a model that have a CacheConfig."""
    collections = (child for child in module.modules() if isinstance(child, CachedEmbeddingBagCollection))
    return {table for collection in collections for table in collection.cache_configs}


@dataclass(frozen=True)
class CacheLoad:
    """One step of one shard, in the mean.

    Attributes:
        lookups (float): ids.
        distinct_rows (float): of these ids.
        misses (float): of the distinct rows, those that are in no slot.
        spilled_rows (float): rows of all batches in flight that find no slot in their set.
    """

    lookups: float = 0
    distinct_rows: float = 0
    misses: float = 0
    spilled_rows: float = 0

    @property
    def hit_rate(self) -> float:
        """Share of the distinct rows that are in a slot; 1 if there are none."""
        return 1 - self.misses / self.distinct_rows if self.distinct_rows else 1.0


def cache_load(
    option: ShardingOption,
    shard: Shard,
    config: CacheConfig,
    constraints: Mapping[str, ParameterConstraints] | None,
    world_size: int,
    batches_in_flight: int = 1,
) -> CacheLoad:
    """What the lookups of a step ask of a shard's cache, once it is warm.

    Where ``ParameterConstraints.cache_params.stats`` has TorchRec's CacheStatistics of the table::

        distinct rows = expected_lookups * share of the table's rows
        misses = distinct rows * expected_miss_rate(slots / rows)

    Otherwise ids are taken to follow Zipf's law (:class:`ZipfLookups`), independent of each other. With D(n) distinct
    rows in n lookups, N lookups a step and C slots, all of the whole table:

    - LRU: slots hold the rows of the last T lookups, D(T) = C + spilled rows; misses = D(T + N) - D(T). Source: Che,
      Tung and Wang, "Hierarchical Web caching systems: modeling, design and experimental results", 2002.
    - LFU: the cache holds the C most frequent rows, and the spill area the last step's others. With D'(n) distinct rows
      among those others, misses = D'(2 N) - D'(N).

    Rows spill whose set is full of rows that batches in flight wait for: with LRU, where X of a set's rows are looked
    up by them, E[max(0, X - 32)] a set, X binomial (:func:`rows_above_ways`). With LFU all misses spill, as they are
    looked up less often than what their set holds: D'(N).

    Every shard has its share of the table's rows and of their lookups, as TorchRec's estimators assume.

    Args:
        option (ShardingOption): one way of sharding the table.
        shard (Shard): one of its shards.
        config (CacheConfig): of the table.
        constraints (Optional[Mapping[str, ParameterConstraints]]): by table.
        world_size (int): ranks.
        batches_in_flight (int): batches whose rows wait for their backward; 2 where the next one is prefetched before.
    """
    rows = shard.size[0]
    lookups = sum(lookups_per_feature(option, shard, constraints, world_size))
    if not rows or not lookups:
        return CacheLoad()
    table_rows: int = option.tensor.shape[0]
    share = rows / table_rows
    load_factor = min(1.0, WAYS * config.num_sets(rows) / rows)
    lfu = config.algorithm == CacheAlgorithm.LFU
    sets = config.num_sets(rows)
    params = option.cache_params
    if params is not None and params.stats is not None:
        distinct = params.stats.expected_lookups * share
        misses = distinct * min(1.0, max(0.0, params.stats.expected_miss_rate(load_factor)))
        spilled = rows_above_ways(rows, sets, min(float(rows), batches_in_flight * distinct))
        return CacheLoad(lookups, distinct, misses, max(spilled, batches_in_flight * misses) if lfu else spilled)
    table, slots, ids = zipf_lookups(table_rows), load_factor * table_rows, lookups / share
    distinct = share * table.distinct_rows(ids)
    spilled = rows_above_ways(rows, sets, share * table.distinct_rows(batches_in_flight * ids))
    if lfu:
        once, twice = (table.distinct_rows(n * ids, slots) for n in (1, 2))
        spilled = max(spilled, share * table.distinct_rows(batches_in_flight * ids, slots))
    else:
        before = lookups_that_fill(table_rows, round(slots + spilled / share))
        once, twice = (table.distinct_rows(n) for n in (before, before + ids))
    return CacheLoad(lookups, distinct, share * max(0.0, twice - once), spilled)


def rows_above_ways(rows: int, sets: int, wanted: float) -> float:
    """How many of ``wanted`` of ``rows`` rows find their set full in the mean, where they lie in the sets by chance.

    ``sets * E[max(0, X - 32)]``, X binomial with ``rows / sets`` trials and the mean ``wanted / sets``.
    """
    trials, mean = rows / sets, wanted / sets
    probability = wanted / rows
    if trials <= WAYS or wanted <= 0:
        return 0.0
    if probability >= 1:
        return rows - float(WAYS * sets)
    free = 0.0
    for k in range(WAYS):
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        free += (WAYS - k) * math.exp(ways + k * math.log(probability) + (trials - k) * math.log1p(-probability))
    return sets * max(0.0, mean - WAYS + free)
