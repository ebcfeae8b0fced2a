"""Misses and spilled rows that the planner expects, against caches that are used."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.shard_estimators import EmbeddingOffloadStats
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.distributed.types import CacheParams

from tests.distributed.planner.cached_models import ZipfIds, model, table, tbe_of_shard, train
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.default_sharders import sharders
from torchrec_mpe.distributed.planner.cache_load import CacheLoad, cache_config, cache_load, rows_above_ways
from torchrec_mpe.distributed.planner.cluster import parse_topology
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.distributed.planner.zipf_lookups import ZipfLookups, lookups_that_fill
from torchrec_mpe.ops.cache_tensors import WAYS

ROWS, LOOKUPS = 50_000, 4_096
LRU, LFU = CacheAlgorithm.LRU, CacheAlgorithm.LFU


def options_of(
    config: CacheConfig, rows: int = ROWS, ranks: int = 1, **constraint: object
) -> dict[str, ShardingOption]:
    """The options of a table with ``LOOKUPS`` lookups a step on all ranks together, by sharding type."""
    planner = MPEShardingPlanner(
        parse_topology(f"{ranks}xCPU:8GB"),
        LOOKUPS // ranks,
        constraints={"t": ParameterConstraints(min_partition=32, **constraint)},
        stats=[],
        debug=False,
    )
    found, _, _ = planner.options(model([table("t", rows)], config), sharders({}))
    return {option.sharding_type: option for option in found}


def load_of(option: ShardingOption, config: CacheConfig, ranks: int = 1, batches: int = 1) -> list[CacheLoad]:
    return [cache_load(option, shard, config, None, ranks, batches) for shard in option.shards]


@pytest.mark.parametrize("rows", [1, 3, 1_000, 200_000])
def test_distinct_rows_are_those_of_every_row_s_probability(rows: int) -> None:
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -1.05
    probability = weights / weights.sum()
    for lookups in (1, 500, 30_000):
        looked_up = 1 - (1 - probability) ** lookups
        zipf = ZipfLookups(rows)
        assert zipf.distinct_rows(lookups) == pytest.approx(float(looked_up.sum()), rel=2e-3)
        without = rows // 20
        assert zipf.distinct_rows(lookups, without) == pytest.approx(float(looked_up[without:].sum()), rel=4e-3)
    assert zipf.distinct_rows(0) == 0
    half = max(1, rows // 2)
    assert zipf.distinct_rows(lookups_that_fill(rows, half)) == pytest.approx(half, rel=1e-6)
    assert lookups_that_fill(rows, rows) == float("inf")


@pytest.mark.parametrize(
    ("config", "warm_up"),
    [
        (CacheConfig(8, 0.05, LRU), 10),
        (CacheConfig(4, 0.2, LRU), 20),
        (CacheConfig(4, 0.02, LRU), 10),  # smaller than a batch
        (CacheConfig(4, 0.02, LFU), 150),
        (CacheConfig(8, 0.1, LFU), 150),
    ],
    ids=str,
)
def test_misses_are_those_of_a_warm_cache(config: CacheConfig, warm_up: int) -> None:
    option = options_of(config)["table_wise"]
    (load,) = load_of(option, config)
    tbe = tbe_of_shard(option, option.shards[0], optimizer=EmbOptimType.EXACT_SGD, learning_rate=0.01)
    ids = ZipfIds(ROWS)
    train(tbe, ids, LOOKUPS, warm_up)
    before = tbe.cache_statistics()[0]
    train(tbe, ids, LOOKUPS, 20)
    counted = tbe.cache_statistics()[0] - before
    assert load.lookups == LOOKUPS
    assert load.distinct_rows == pytest.approx(counted.num_unique_indices / 20, rel=0.02)
    assert load.misses == pytest.approx(counted.num_unique_misses / 20, rel=0.05)
    assert load.hit_rate == pytest.approx(counted.hit_rate, abs=0.02)
    assert 0.2 < load.hit_rate < 0.9


def test_a_cache_of_all_rows_never_misses() -> None:
    for algorithm in (LRU, LFU):
        config = CacheConfig(8, 1.0, algorithm)
        (load,) = load_of(options_of(config)["table_wise"], config)
        assert load.misses == load.spilled_rows == 0
        assert load.hit_rate == 1


def test_shards_of_rows_share_the_lookups_and_those_of_columns_repeat_them() -> None:
    config = CacheConfig(4, 0.05, LFU)
    by_type = options_of(config, ranks=2)
    (whole,) = load_of(by_type["table_wise"], config, 2)
    rows, columns = (load_of(by_type[kind], config, 2) for kind in ("row_wise", "column_wise"))
    assert columns == [whole, whole]
    assert rows[0] == rows[1]
    assert 2 * rows[0].distinct_rows == pytest.approx(whole.distinct_rows)
    # Sets are rounded up for each shard.
    assert 2 * rows[0].misses == pytest.approx(whole.misses, rel=0.02)


def test_a_shard_without_rows_has_no_load() -> None:
    config = CacheConfig()
    loads = load_of(options_of(config, rows=5, ranks=4)["row_wise"], config, 4)
    assert loads[-1] == CacheLoad()
    assert loads[0].lookups > 0


def test_statistics_of_the_user_come_before_the_assumption() -> None:
    # Half of the operations have a stack distance in the first of ten bins of 5,000 rows, half in the second.
    histogram = torch.tensor([1.0, 1.0] + [0.0] * 8)
    stats = EmbeddingOffloadStats(0.5, 1_000, histogram, ROWS)
    for load_factor, miss_rate in ((0.05, 0.5), (0.12, 0.0)):
        config = CacheConfig(8, load_factor, LRU)
        option = options_of(config, ranks=2, cache_params=CacheParams(stats=stats))["row_wise"]
        first, second = load_of(option, config, 2)
        assert first == second
        assert first.distinct_rows == 500
        assert first.misses == 500 * stats.expected_miss_rate(WAYS * config.num_sets(ROWS // 2) / (ROWS // 2))
        assert first.misses == 500 * miss_rate
    config = CacheConfig(8, 0.05, LFU)
    option = options_of(config, cache_params=CacheParams(stats=stats))["table_wise"]
    for batches in (1, 2):
        (load,) = load_of(option, config, batches=batches)
        assert load.spilled_rows == batches * load.misses == batches * 500


def test_rows_above_ways_are_those_of_rows_in_sets_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, sets, wanted in ((20_000, 61, 2_500), (20_000, 61, 9_000), (5_000, 41, 1_200)):
        spilled = 0
        for _ in range(200):
            chosen = torch.randperm(rows, generator=generator)[:wanted]
            spilled += int((torch.bincount(chosen % sets, minlength=sets) - WAYS).clamp(min=0).sum())
        assert rows_above_ways(rows, sets, wanted) == pytest.approx(spilled / 200, rel=0.04)
    assert rows_above_ways(20_000, 61, 600) < 1e-2
    assert rows_above_ways(20_000, 61, 0) == 0
    assert rows_above_ways(20_000, 61, 20_000) == 20_000 - 61 * WAYS
    assert rows_above_ways(20_000, 625, 20_000) == 0, "as many slots as rows"


def test_two_batches_in_flight_spill_more() -> None:
    config = CacheConfig(8, 0.03, LRU)
    option = options_of(config)["table_wise"]
    (one,), (two,) = (load_of(option, config, batches=n) for n in (1, 2))
    assert two.spilled_rows > 4 * one.spilled_rows > 0
    assert two.misses < one.misses, "rows that wait in the spill area are no misses"


def test_only_the_customized_kernel_of_a_table_with_a_cache_is_cached() -> None:
    config = CacheConfig()
    (option, *_) = options_of(config).values()
    assert cache_config(option) is config
    option.compute_kernel = EmbeddingComputeKernel.FUSED.value
    assert cache_config(option) is None
