"""TorchRec's own collections, sharded in one process, for tests of what we use of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torchrec.distributed import comm
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    grid_shard,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.upstream.process_group import store_in_memory

KINDS: dict[str, Any] = {
    "table_wise": lambda: table_wise(rank=0),
    "row_wise": row_wise,
    "column_wise": lambda: column_wise(ranks=[0]),
    "table_row_wise": lambda: table_row_wise(host_index=0),
    "grid_shard": lambda: grid_shard(host_indexes=[0]),
    "data_parallel": data_parallel,
}
CPU = torch.device("cpu")


@contextmanager
def one_process() -> Iterator[ShardingEnv]:
    dist.init_process_group("gloo", store=store_in_memory(), rank=0, world_size=1)
    # TorchRec keeps the groups of a host's ranks, those of the last world too.
    with mock.patch.multiple(comm, _INTRA_PG=None, _CROSS_PG=None):
        try:
            yield ShardingEnv.from_process_group(dist.GroupMember.WORLD)
        finally:
            dist.destroy_process_group()


def collection(means: tuple[str, ...] = (), dims: dict[str, int] | None = None, **tables: str) -> Any:
    """An EmbeddingBagCollection with a feature ``f_<table>`` a table, and the plan that shards each as it says."""
    dims = dims or {}
    module = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=8,
                embedding_dim=dims.get(name, 4),
                feature_names=[f"f_{name}"],
                pooling=PoolingType.MEAN if name in means else PoolingType.SUM,
            )
            for name in tables
        ]
    )
    plan = construct_module_sharding_plan(
        module,
        per_param_sharding={name: KINDS[kind]() for name, kind in tables.items()},
        sharder=_CpuSharder(),
        local_size=1,
        world_size=1,
        device_type="cpu",
    )
    for name, kind in tables.items():
        plan[name].compute_kernel = "dense" if kind == "data_parallel" else "fused"
    return module, plan


class _CpuSharder(EmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(KINDS)


def batch(*features: str, seed: int = 0) -> KeyedJaggedTensor:
    """Three bags of each feature, of 1 to 3 ids."""
    g = torch.Generator().manual_seed(seed)
    lengths = {f: torch.randint(1, 4, (3,), generator=torch.Generator().manual_seed(len(f) + seed)) for f in features}
    ids = [torch.randint(8, (int(n.sum()),), generator=g) for n in lengths.values()]
    return KeyedJaggedTensor.from_lengths_sync(list(features), torch.cat(ids), torch.cat(list(lengths.values())))


def variable_batch(**bags: list[list[int]]) -> KeyedJaggedTensor:
    """A batch of one rank whose features have different numbers of bags, all of which one example has."""
    ids = torch.tensor([i for of_feature in bags.values() for bag in of_feature for i in bag])
    lengths = torch.tensor([len(bag) for of_feature in bags.values() for bag in of_feature])
    return KeyedJaggedTensor(
        list(bags),
        ids,
        lengths=lengths,
        stride_per_key_per_rank=[[len(of_feature)] for of_feature in bags.values()],
        inverse_indices=(list(bags), torch.zeros(len(bags), 1, dtype=torch.int64)),
    )
