"""The unsharded collection of cached tables, and the way from it to a sharded one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import Topology
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.precision.from_frequencies import cut_precision, uniform_precision

META = torch.device("meta")


def tables(**changes: Any) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            **{"name": name, "num_embeddings": 1000, "embedding_dim": 8, "feature_names": [f"f_{name}"], **changes}
        )
        for name in ("t1", "t2")
    ]


def test_caches_by_table() -> None:
    int4 = mpe.CacheConfig(bits=4, load_factor=0.1)
    assert mpe.CachedEmbeddingBagCollection(tables(), device=META).cache_configs == {
        "t1": mpe.CacheConfig(),
        "t2": mpe.CacheConfig(),
    }
    assert mpe.CachedEmbeddingBagCollection(tables(), device=META, cache={"t2": int4}).cache_configs == {"t2": int4}


def test_wide_rows_are_those_above_four_bits() -> None:
    counts = {"t1": torch.arange(1000), "t2": torch.arange(1000)}
    plan = cut_precision(counts, tables(), 6, 0.25)
    collection = mpe.CachedEmbeddingBagCollection(tables(), device=META, precision=plan)
    wide = collection.wide_rows("t1", 700, 800)
    assert wide is not None and torch.equal(wide, torch.arange(700, 800) >= 750)
    assert mpe.CachedEmbeddingBagCollection(tables(), device=META).wide_rows("t1", 0, 10) is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a cache is configured for table t3, the tables are t1, t2"):
        mpe.CachedEmbeddingBagCollection(tables(), device=META, cache={"t3": mpe.CacheConfig()})
    with pytest.raises(ValueError, match="table t1 has data type FP16: the cache is for FP32"):
        mpe.CachedEmbeddingBagCollection(tables(data_type=DataType.FP16), device=META)
    plan = uniform_precision(tables(num_embeddings=999), 4)
    with pytest.raises(ValueError, match="table t1 has 1000 rows, in the precision plan 999"):
        mpe.CachedEmbeddingBagCollection(tables(), device=META, precision=plan)


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as a world of one."""
    with process_group(torch.device("cpu")):
        yield


def test_the_example(alone: None) -> None:
    cache = mpe.CacheConfig(bits=8, load_factor=0.05)
    model = mpe.CachedEmbeddingBagCollection(tables(), device=META, cache=cache)
    fused = mpe.sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.02})
    planner = mpe.MPEShardingPlanner(Topology(world_size=1, compute_device="cpu"), batch_size=512)
    plan = planner.collective_plan(model, fused, dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=fused)
    kjt = KeyedJaggedTensor.from_lengths_sync(
        ["f_t1", "f_t2"], torch.tensor([0, 999, 2, 5]), torch.tensor([2, 0, 1, 1])
    )
    before = dmp(kjt)["f_t1"]
    before.sum().backward()
    after = dmp(kjt)["f_t1"]
    # Row-wise Adagrad's first step is the learning rate in the direction of the gradient, for each of two rows.
    torch.testing.assert_close(after[0], before[0] - 2 * 0.02, rtol=0, atol=1e-6)
    assert torch.equal(after[1], torch.zeros(8))
    statistics = dmp.module.cache_statistics()["t1"]
    assert (statistics.num_calls, statistics.num_unique_indices, statistics.num_unique_misses) == (2, 4, 2)
    fp32 = 2 * 1000 * 8 * 4
    assert sum(shard.emb_module.stores()[shard.table].rows8.nbytes for shard in dmp.module.cached_shards()) < fp32 / 2
