"""Cached tables for the planner's tests, and lookups of them under Zipf's law."""

from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints, Shard, ShardingOption
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe
from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.distributed.planner.cluster import parse_topology
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.distributed.planner.zipf_lookups import ZIPF_EXPONENT
from torchrec_mpe.modules.cached_embedding_bag_collection import CachedEmbeddingBagCollection

KINDS = ("store", "cache", "spill", "optimizer_state", "directory")


def table(name: str, rows: int, dim: int = 64) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"{name}_f"])


def model(
    tables: list[EmbeddingBagConfig],
    cache: CacheConfig | dict[str, CacheConfig],
    precision: mpe.PrecisionPlan | None = None,
) -> nn.ModuleDict:
    meta = torch.device("meta")
    return nn.ModuleDict({"ebc": CachedEmbeddingBagCollection(tables, False, meta, cache, precision)})


def tbe_of_shard(option: ShardingOption, shard: Shard, **fused_params: Any) -> CachedTableBatchedEmbeddingBags:
    """The TBE that a shard of one table makes on its rank."""
    collection: CachedEmbeddingBagCollection = option.module[1]
    (rows, columns), (first_row, first_column) = shard.size, shard.offset
    config = collection.cache_configs[option.name]
    wide_rows = collection.wide_rows(option.name, first_row, first_row + rows)
    spec = CachedTableSpec(option.name, rows, columns, config, wide_rows, first_row, first_column)
    return CachedTableBatchedEmbeddingBags([spec], **fused_params)


class ZipfIds:
    """Ids drawn independently; which row is how frequent is drawn first."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
        self._upper = weights.cumsum(0) / weights.sum()
        self._rows = torch.randperm(rows, generator=self._generator)

    def draw(self, count: int) -> Tensor:
        drawn = torch.rand(count, dtype=torch.float64, generator=self._generator)
        return self._rows[torch.searchsorted(self._upper, drawn).clamp(max=len(self._rows) - 1)]


def train(tbe: CachedTableBatchedEmbeddingBags, ids: ZipfIds, lookups: int, steps: int) -> None:
    """Steps of as many lookups in one bag each."""
    for _ in range(steps):
        tbe(ids.draw(lookups), torch.tensor([0, lookups])).sum().backward()


def held_and_estimated(sharding_type: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by kind that this rank's shards of three tables hold, and what the planner says they do."""
    caches = {
        "lru": CacheConfig(8, 0.05, CacheAlgorithm.LRU),
        "lfu": CacheConfig(4, 0.2, CacheAlgorithm.LFU, spill_rows=40),
        "one_row": CacheConfig(4, 0.5, CacheAlgorithm.LFU),
    }
    rows = {"lru": 9_999, "lfu": 3_000, "one_row": 1}
    module = model([table(name, rows[name]) for name in caches], caches)
    made = MPEShardingPlanner(
        parse_topology(f"{dist.get_world_size()}xCPU:8GB"),
        4,
        constraints={t: ParameterConstraints(sharding_types=[sharding_type], min_partition=32) for t in caches},
        stats=[],
        debug=False,
    )
    sharders = mpe.sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1})
    plan = made.plan(module, sharders)
    assert made._best_plan is not None and made._storage_estimator is not None
    estimated, held = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for option in made._best_plan:
        for shard, of_shard in zip(option.shards, made._storage_estimator.shard_bytes(option), strict=True):
            if shard.rank == dist.get_rank():
                estimated = {kind: estimated[kind] + of_shard.by_kind()[kind] for kind in KINDS}
    sharded = DistributedModelParallel(module, device=torch.device("cpu"), plan=plan, sharders=sharders)
    for kernel in sharded.module["ebc"].kernels():
        held = {kind: held[kind] + kernel.emb_module.bytes_by_kind()[kind] for kind in KINDS}
    return held, estimated
