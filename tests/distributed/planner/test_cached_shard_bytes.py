"""The storage estimate of cached tables against the bytes of the TBEs that their shards make."""

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology
from torchrec.distributed.types import PipelineType

from tests.distributed.planner.cached_models import KINDS, ZipfIds, model, table, tbe_of_shard, train
from torchrec_mpe import PrecisionPlan
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.default_sharders import sharders
from torchrec_mpe.distributed.planner.cluster import parse_topology
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.distributed.planner.shard_bytes import ShardBytes
from torchrec_mpe.distributed.planner.unpooled_rows import unpooled_rows
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.packing.bit_widths import TableBitWidths

LRU, LFU = CacheAlgorithm.LRU, CacheAlgorithm.LFU
ADAGRAD, ROWWISE = EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD
SGD = EmbOptimType.EXACT_SGD


def planner(topology: Topology | str, batch_size: int, **settings: Any) -> MPEShardingPlanner:
    chosen = parse_topology(topology) if isinstance(topology, str) else topology
    constraints = {"t": ParameterConstraints(min_partition=32)}
    return MPEShardingPlanner(chosen, batch_size, constraints=constraints, stats=[], debug=False, **settings)


def table_wise(made: MPEShardingPlanner, config: CacheConfig, rows: int) -> tuple[ShardingOption, ShardBytes]:
    """The option of a table with row-wise Adagrad and the bytes of its shard."""
    options, estimator, _ = made.options(model([table("t", rows)], config), sharders({"optimizer": ROWWISE}))
    option = next(option for option in options if option.sharding_type == "table_wise")
    return option, estimator.shard_bytes(option)[0]


def widths(rows: int, ranked: bool) -> PrecisionPlan:
    """A third of the rows gets more than 4 bits: the first ones, or some all over the table."""
    ranks = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).int() if ranked else None
    return PrecisionPlan({"t": TableBitWidths(rows, 64, (0, rows // 3, rows // 2, rows), (6, 4, 1), ranks)}, (6, 4, 1))


@pytest.mark.parametrize("optimizer", [SGD, ADAGRAD, ROWWISE], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (CacheConfig(8, 0.05, LRU), None),
        (CacheConfig(4, 0.1, LFU, spill_rows=70), None),
        (CacheConfig(4, 0.5, LRU, optimizer_state_dtype="fp32", spill_rows=3), None),
        (CacheConfig(8, 0.02, LFU, spill_rows=50), widths(7_001, ranked=False)),
        (CacheConfig(4, 1.0, LRU), widths(7_001, ranked=True)),
    ],
    ids=str,
)
def test_what_a_shard_holds_is_exact(
    config: CacheConfig, precision: PrecisionPlan | None, optimizer: EmbOptimType
) -> None:
    made = planner("3xCPU:8GB", 4)
    tables = [table("t", 7_001)]
    options, estimator, _ = made.options(model(tables, config, precision), sharders({"optimizer": optimizer}))
    assert {option.sharding_type for option in options} == {"table_wise", "row_wise", "column_wise"}
    for option in options:
        for shard, held in zip(option.shards, estimator.shard_bytes(option), strict=True):
            real = tbe_of_shard(option, shard, optimizer=optimizer, learning_rate=0.1).bytes_by_kind()
            estimate = held.by_kind()
            assert {kind: estimate[kind] for kind in KINDS} == {kind: real[kind] for kind in KINDS}
            assert estimate["rows"] == 0
            assert shard.storage.ddr == sum(estimate.values())
            assert shard.storage.hbm == 0


@pytest.mark.parametrize(
    ("config", "rows", "lookups", "steps"),
    [(CacheConfig(8, 0.05, LRU), 100_000, 20_480, 6), (CacheConfig(4, 0.01, LFU), 300_000, 8_192, 60)],
    ids=["INT8, 5%, LRU", "INT4, 1%, LFU"],
)
def test_a_shard_in_training_is_within_5_percent(config: CacheConfig, rows: int, lookups: int, steps: int) -> None:
    """The spill area too, which grows with the batches."""
    option, held = table_wise(planner("1xCPU:8GB", lookups), config, rows)
    estimate = held.by_kind()
    tbe = tbe_of_shard(option, option.shards[0], optimizer=ROWWISE, learning_rate=0.02)
    train(tbe, ZipfIds(rows), lookups, steps)
    real = tbe.bytes_by_kind()
    assert real["spill"] > 0.2 * real["cache"], "there is something to estimate"
    assert real["spill"] <= 1.1 * estimate["spill"], "a quarter above what a batch needs; some need more than the mean"
    assert estimate["spill"] <= 1.25 * real["spill"], "or exactly what a batch needs"
    assert sum(estimate[kind] for kind in KINDS) == pytest.approx(sum(real.values()), rel=0.05)


def test_the_store_is_in_host_memory_or_on_the_device() -> None:
    rows, dim = 1_000_000, 64
    by_location = {}
    for location in ("host", "device"):
        config = CacheConfig(4, 0.01, LFU, location=location)
        option, held = table_wise(planner("1xH100", 512), config, rows)
        assert held.store == rows * (dim // 2 + 2 + 1)
        assert option.shards[0].storage.hbm + option.shards[0].storage.ddr == held.total
        by_location[location] = option.shards[0].storage
    assert by_location["host"].ddr == rows * (dim // 2 + 2 + 1)
    assert by_location["device"].ddr == 0
    assert by_location["host"].hbm < 0.3 * by_location["device"].hbm


def test_ids_outputs_and_slots_are_counted() -> None:
    """Each rank's 512 ids, int64, and their bags of 64 float32, as TorchRec has them; and the slot of each id."""
    _, held = table_wise(planner("2xH100", 512), CacheConfig(8, 0.05, LRU), 100_000)
    assert held.inputs_outputs == 2 * 512 * (8 + 64 * 4 + 8)


def test_a_prefetching_pipeline_has_two_batches_in_flight() -> None:
    held = {}
    for pipeline in (PipelineType.TRAIN_SPARSE_DIST, PipelineType.TRAIN_PREFETCH_SPARSE_DIST):
        made = planner("1xH100", 8_192, pipeline_type=pipeline)
        _, held[pipeline] = table_wise(made, CacheConfig(4, 0.01, LFU), 100_000)
    one, two = held.values()
    assert one.spill < two.spill < 2 * one.spill
    # One batch of ids and one of slots more.
    assert two.inputs_outputs - one.inputs_outputs == 8_192 * (8 + 8)
    assert two.cache == one.cache


@pytest.mark.parametrize("topology", ["1xCPU:8GB", "1xH100"])
def test_phases_add_what_they_add_to_tables_without_a_cache(topology: str) -> None:
    held = {}
    for phase in (Phase.PLAIN, Phase.SEARCH):
        held[phase] = table_wise(planner(topology, 512, phase=phase), CacheConfig(), 50_000)[1].by_kind()
    plain, search = held.values()
    assert search["row_map"] == 50_000 * 2
    device = "cpu" if "CPU" in topology else "cuda"
    fused = unpooled_rows([512], 50_000, 64, 2, device, "fused", EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    assert search["activations"] == fused.activations, "as of a table without a cache"
    assert {kind: search[kind] for kind in KINDS} == {kind: plain[kind] for kind in KINDS}


def test_an_unknown_optimizer_names_the_table() -> None:
    with pytest.raises(ValueError, match="table t: the optimizer state of shampoo"):
        planner("1xH100", 512).options(
            model([table("t", 500)], CacheConfig()), sharders({"optimizer": EmbOptimType.SHAMPOO})
        )
