"""A model whose tables are larger than their caches, trained for some steps on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import Tensor, nn
from torch.distributed import _remote_device
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import torchrec_mpe as mpe
from torchrec_mpe.distributed.cached_embeddingbag import ShardedCachedEmbeddingBagCollection
from torchrec_mpe.precision.from_frequencies import cut_precision
from torchrec_mpe.precision.row_initialization import RowInitialization

SGD, ADAGRAD, ROWWISE = EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD
LRU, LFU = CacheAlgorithm.LRU, CacheAlgorithm.LFU
GLOBAL_BATCH = 16
SHARD_COLUMNS = 8
INITIALIZATION = RowInitialization(seed=4, std=0.1)
SMALL = mpe.CacheConfig(bits=8, load_factor=0.25)
WHOLE = mpe.CacheConfig(bits=8, load_factor=1.0)


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        sharding (tuple[str, ...]): sharding type of all tables, or of each.
        cache (CacheConfig): of the cached tables.
        uncached (tuple[str, ...]): tables that have no cache.
        mixed (bool): store widths from a precision plan.
        all_on_rank (Optional[int]): the rank that owns every table; the planner chooses if None.
    """

    sharding: tuple[str, ...]
    cache: mpe.CacheConfig = SMALL
    uncached: tuple[str, ...] = ()
    optimizer: EmbOptimType = ROWWISE
    mean: bool = False
    weighted: bool = False
    int32: bool = False
    mixed: bool = False
    all_on_rank: int | None = None

    def __str__(self) -> str:
        names = {f: getattr(self, f) for f in self.__dataclass_fields__ if getattr(self, f) != getattr(Case(()), f)}
        if "cache" in names:
            names["cache"] = f"int{self.cache.bits}:{self.cache.load_factor}:{self.cache.algorithm.name}"
        return " ".join(f"{k}={v.name if isinstance(v, EmbOptimType) else v}" for k, v in names.items())

    def sharding_of(self, table: str) -> str:
        names = [t.name for t in tables(self)]
        return self.sharding[names.index(table)] if len(self.sharding) > 1 else self.sharding[0]


def tables(case: Case) -> list[EmbeddingBagConfig]:
    """Tables of several sets, one of two features, a feature in two tables, and one table of three rows."""
    shapes = [("t0", 400, 16, ["a", "b"]), ("t1", 300, 16, ["c"]), ("t2", 350, 32, ["b"]), ("t3", 3, 16, ["d"])]
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=features,
            pooling=PoolingType.MEAN if case.mean else PoolingType.SUM,
        )
        for name, rows, dim, features in shapes
    ]


KEYS = {"a": 16, "b@t0": 16, "c": 16, "b@t2": 32, "d": 16}
ROWS_OF_FEATURE = {"a": 400, "b": 350, "c": 300, "d": 3}


def counts(case: Case) -> dict[str, Tensor]:
    """Lookups of every row, so that half of a table's rows are wide."""
    g = torch.Generator().manual_seed(3)
    return {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=g) for t in tables(case)}


def precision(case: Case) -> mpe.PrecisionPlan:
    return cut_precision(counts(case), tables(case), 6, 0.5, initialization=INITIALIZATION)


class Model(nn.Module):
    """The collection alone: no parameter is replicated."""

    def __init__(self, case: Case, cached: bool = True) -> None:
        super().__init__()
        if cached:
            caches = {t.name: case.cache for t in tables(case) if t.name not in case.uncached}
            plan = precision(case) if case.mixed else None
            self.ebc: nn.Module = mpe.CachedEmbeddingBagCollection(
                tables(case), case.weighted, torch.device("meta"), cache=caches, precision=plan
            )
        else:
            self.ebc = mpe.MPEEmbeddingBagCollection(tables(case), case.weighted, torch.device("meta"))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled: KeyedTensor = self.ebc(features)
        return torch.cat([pooled[key] for key in KEYS], 1)


def sharding_plan(model: nn.Module, case: Case, cached: bool = True) -> ShardingPlan:
    constraints = {
        t.name: ParameterConstraints(
            sharding_types=[case.sharding_of(t.name)], min_partition=SHARD_COLUMNS, compute_kernels=["fused"]
        )
        for t in tables(case)
    }
    topology = Topology(
        world_size=dist.get_world_size(), local_world_size=get_local_size(), compute_device="cpu", hbm_cap=2**30
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    plan = planner.collective_plan(model, mpe.sharders(), dist.GroupMember.WORLD)
    for table, sharding in (item for module in plan.plan.values() for item in module.items()):
        # Set here: TorchRec's planner has no estimates for the kernel.
        if cached and table not in case.uncached:
            sharding.compute_kernel = "customized_kernel"
        if case.all_on_rank is not None:
            sharding.ranks = [case.all_on_rank]
            for part in sharding.sharding_spec.shards:
                part.placement = _remote_device(f"rank:{case.all_on_rank}/cpu")
    return plan


def fused_params(case: Case) -> dict[str, Any]:
    return {"optimizer": case.optimizer, "learning_rate": 0.1, "eps": 0.01}


def shard(model: nn.Module, case: Case, cached: bool = True) -> DistributedModelParallel:
    plan = sharding_plan(model, case, cached)
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=plan, sharders=mpe.sharders(fused_params(case))
    )


def sharded(case: Case) -> DistributedModelParallel:
    model = shard(Model(case), case)
    mpe.reset_rows_(model, INITIALIZATION)
    return model


def uncached_like(model: DistributedModelParallel, case: Case) -> DistributedModelParallel:
    """TorchRec's own TBEs under the same sharding, with the same rows."""
    other = shard(Model(case, cached=False), case, cached=False)
    copy_rows(model, other)
    return other


def copy_rows(model: DistributedModelParallel, other: DistributedModelParallel) -> None:
    """From a cached model to one of TorchRec's own TBEs."""
    rows = {(table, row, column): values for table, row, column, values in shards(model)}
    for table, row, column, values in other.module.ebc.local_shards():
        values.copy_(torch.from_numpy(rows[table, row, column]))


def local_batch(step: int, case: Case) -> tuple[KeyedJaggedTensor, Tensor]:
    """This rank's part of a global batch: bags of which some are empty, small ids more often than large ones."""
    g = torch.Generator().manual_seed(100 + step)
    size = GLOBAL_BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    bags: list[list[int]] = []
    weights: list[float] = []
    for rows in ROWS_OF_FEATURE.values():
        lengths = torch.randint(0, 8, (GLOBAL_BATCH,), generator=g).tolist()
        ids = [(rows * torch.rand(n, generator=g) ** 2).long().tolist() for n in lengths]
        of_ids = [(torch.rand(n, generator=g) + 0.5).tolist() for n in lengths]
        bags += ids[mine]
        weights += [w for bag in of_ids[mine] for w in bag]
    dtype = torch.int32 if case.int32 else torch.int64
    features = KeyedJaggedTensor.from_lengths_sync(
        list(ROWS_OF_FEATURE),
        torch.tensor([i for bag in bags for i in bag], dtype=dtype),
        torch.tensor([len(bag) for bag in bags], dtype=dtype),
        torch.tensor(weights) if case.weighted else None,
    )
    return features, torch.randn(GLOBAL_BATCH, sum(KEYS.values()), generator=g)[mine]


def train(model: nn.Module, case: Case, first: int, last: int) -> list[np.ndarray[Any, Any]]:
    """Pooled embeddings of each step."""
    model.train()
    pooled = []
    for step in range(first, last):
        features, targets = local_batch(step, case)
        out = model(features)
        # The mean of a power of two of numbers: the same bits on any number of ranks.
        (10 * (out - targets) ** 2).sum(1).mean().backward()
        pooled.append(out.detach().numpy())
    return pooled


def shards(model: DistributedModelParallel) -> Iterator[tuple[str, int, int, np.ndarray[Any, Any]]]:
    """This rank's rows as they are, cached or not."""
    ebc = model.module.ebc
    for table, row, column, values in ebc.local_shards():
        yield table, row, column, values.detach().numpy().copy()
    if isinstance(ebc, ShardedCachedEmbeddingBagCollection):
        for part in ebc.cached_shards():
            yield part.name, part.first_row, part.first_column, part.read(0, part.rows).numpy()


def whole(
    by_rank: list[list[tuple[str, int, int, np.ndarray[Any, Any]]]], case: Case
) -> dict[str, np.ndarray[Any, Any]]:
    """Tables put together from the shards of all ranks, NaN where there is none."""
    found = {t.name: np.full((t.num_embeddings, t.embedding_dim), np.nan, np.float32) for t in tables(case)}
    for table, row, column, values in (part for of_rank in by_rank for part in of_rank):
        found[table][row : row + values.shape[0], column : column + values.shape[1]] = values
    return found
