"""Planning models with cached tables: what is chosen, how long a step is taken to be, what the report says."""

import re
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.shard_estimators import EmbeddingOffloadStats
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, ShardingOption, Topology
from torchrec.distributed.types import CacheParams, ParameterSharding

from tests.distributed.planner.cached_models import model, table
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.distributed.default_sharders import sharders
from torchrec_mpe.distributed.planner.cache_load import cache_load
from torchrec_mpe.distributed.planner.cluster import parse_topology
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner

CACHED = EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value
FUSED, DENSE = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value
SHARDERS = sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
INT8 = CacheConfig(8, 0.05, CacheAlgorithm.LRU)
INT4 = CacheConfig(4, 0.01, CacheAlgorithm.LFU)


def planner(topology: Topology | str, **settings: Any) -> MPEShardingPlanner:
    chosen = parse_topology(topology) if isinstance(topology, str) else topology
    return MPEShardingPlanner(chosen, **{"batch_size": 512, "stats": [], "debug": False, **settings})


def planned(made: MPEShardingPlanner, module: torch.nn.Module) -> dict[str, ParameterSharding]:
    return dict(made.plan(module, SHARDERS).plan["ebc"])


def table_wise(made: MPEShardingPlanner, config: CacheConfig | dict[str, CacheConfig], rows: int) -> ShardingOption:
    options, _, _ = made.options(model([table("t", rows)], config), SHARDERS)
    return next(option for option in options if option.sharding_type == "table_wise")


def test_tables_with_a_cache_get_the_kernel_and_the_others_not() -> None:
    data_parallel = ParameterConstraints(sharding_types=["data_parallel"])
    made = planner("2xCPU:8GB", constraints={"c": data_parallel})
    chosen = planned(made, model([table(name, 5_000) for name in "abc"], {"a": INT8}))
    assert {name: sharding.compute_kernel for name, sharding in chosen.items()} == {
        "a": CACHED,
        "b": FUSED,
        "c": DENSE,
    }


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise", "table_row_wise"])
def test_every_sharding_type_is_planned(kind: str) -> None:
    constraints = {"t": ParameterConstraints(sharding_types=[kind], min_partition=32)}
    made = planner(parse_topology("4xH100", devices_per_host=2), constraints=constraints)
    chosen = planned(made, model([table("t", 1_000_000)], INT8))["t"]
    assert (chosen.sharding_type, chosen.compute_kernel) == (kind, CACHED)
    assert made.report().tables[0].by_kind["store"] > 1_000_000 * 64


def test_a_cached_table_can_be_constrained_to_the_fused_kernel() -> None:
    constraints = {"t": ParameterConstraints(compute_kernels=[FUSED])}
    made = planner("2xH100", constraints=constraints)
    assert planned(made, model([table("t", 5_000)], INT8))["t"].compute_kernel == FUSED
    assert made.report().tables[0].by_kind["rows"] == 5_000 * 64 * 4


def test_the_kernel_without_a_cache_and_a_cache_without_the_kernel_are_refused() -> None:
    constraints = {"t": ParameterConstraints(compute_kernels=[CACHED])}
    with pytest.raises(
        ValueError, match="table t is constrained to the compute kernel customized_kernel but has no ca"
    ):
        planned(planner("2xH100", constraints=constraints), model([table("t", 500)], {}))
    for kernels in (None, [CACHED], [DENSE]):
        constraints = {"t": ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=kernels)}
        with pytest.raises(ValueError, match=r"table t .* with a cache needs customized_kernel and cannot be data_par"):
            planned(planner("2xH100", constraints=constraints), model([table("t", 500)], INT8))
    both = {"t": ParameterConstraints(sharding_types=["data_parallel", "row_wise"])}
    chosen = planned(planner("2xH100", constraints=both), model([table("t", 500)], INT8))["t"]
    assert (chosen.sharding_type, chosen.compute_kernel) == ("row_wise", CACHED)


def test_the_report_has_the_kernel_and_the_bytes_by_kind() -> None:
    made = planner("1xH100")
    planned(made, model([table("t", 100_000_000)], INT4))
    report = made.report()
    # 35 bytes a row in the store; 31,251 sets of 32 slots, of 64 float32; one of optimizer state each.
    listed = r"^t +100,000,000 +64 +table_wise/customized_kernel +0 +3\.50 GB +256\.01 MB +"
    assert re.search(listed, str(report), re.MULTILINE)
    assert re.search(r"^table .* store +cache +spill +directory +optimizer +in/out", str(report), re.MULTILINE)
    assert report.host_bytes == (3_500_000_000,)
    by_kind = report.tables[0].by_kind
    assert report.device_bytes[0] == sum(by_kind.values()) - by_kind["store"]
    assert "host memory for tables: max 3.50 GB a rank" in str(report)


def test_a_cache_makes_fit_what_does_not() -> None:
    """102.4 GB in fp32, 27 GB in INT8 with the cache."""
    tables = [table("t", 400_000_000)]
    on_device = CacheConfig(8, 0.05, CacheAlgorithm.LRU, location="device")
    with pytest.raises(PlannerError, match="no sharding plan fits 1 devices"):
        planned(planner("1xH100"), model(tables, {}))
    assert planned(planner("1xH100"), model(tables, on_device))


def test_when_nothing_fits_the_error_lists_the_bytes_and_a_number_of_devices_that_do() -> None:
    on_device = CacheConfig(8, 0.05, CacheAlgorithm.LRU, location="device")
    module = model([table("a", 200_000_000), table("b", 150_000_000)], on_device)
    with pytest.raises(PlannerError) as raised:
        planned(planner(parse_topology("1xH100:30GB", devices_per_host=1)), module)
    message = str(raised.value)
    assert re.search(r"^a +200,000,000 +64 +\w+/customized_kernel +13\.40 GB +2\.56 GB", message, re.MULTILINE)
    assert "compute kernel fused_uvm_caching" not in message, "which a cached table cannot have"
    devices = int(re.search(r"- (\d+) devices of this kind instead of 1", message)[1])  # type: ignore[index]
    assert planned(planner(parse_topology(f"{devices}xH100:30GB", devices_per_host=1)), module)
    with pytest.raises(PlannerError):
        planned(planner(parse_topology(f"{devices - 1}xH100:30GB", devices_per_host=1)), module)


def test_a_step_takes_the_fused_step_and_the_prefetch() -> None:
    """2,048 ids a step; INT8 rows of 67 bytes over 64 GB/s to the host, slots of 260 bytes at 3.35 TB/s."""
    made = planner("1xH100", batch_size=2_048)
    cached = table_wise(made, INT8, 1_000_000)
    fused = table_wise(made, {}, 1_000_000)
    load = cache_load(cached, cached.shards[0], INT8, None, 1)
    assert 400 < load.misses < 500
    perf, without = cached.shards[0].perf, fused.shards[0].perf
    assert (perf.fwd_compute, perf.bwd_compute) == (without.fwd_compute, without.bwd_compute)
    expected = 2 * load.misses * 67 / 64e9 + (2 * load.misses * 260 + 2_048 * 144) / 3.35e12
    assert perf.prefetch_compute == pytest.approx(expected * 1e3)
    assert perf.total == pytest.approx(without.total + expected * 1e3)
    on_device = table_wise(made, CacheConfig(8, 0.05, CacheAlgorithm.LRU, location="device"), 1_000_000)
    expected = (2 * load.misses * (67 + 260) + 2_048 * 144) / 3.35e12
    assert on_device.shards[0].perf.prefetch_compute == pytest.approx(expected * 1e3)


def test_a_larger_cache_or_a_better_hit_rate_makes_a_shorter_step() -> None:
    def prefetch_ms(config: CacheConfig, params: CacheParams | None = None) -> float:
        constraints = {"t": ParameterConstraints(cache_params=params)}
        return float(table_wise(planner("1xH100", constraints=constraints), config, 1_000_000).shards[0].perf.total)

    small, large = (CacheConfig(8, load_factor, CacheAlgorithm.LRU) for load_factor in (0.01, 0.3))
    assert prefetch_ms(large) < prefetch_ms(small)
    # All operations within the first of a hundred bins: no misses; evenly over the bins: 99% misses.
    hit, missed = (torch.tensor([1.0, other] + [other] * 98) for other in (0.0, 1.0))
    of_hits, of_misses = (CacheParams(stats=EmbeddingOffloadStats(0.5, 400, h, 1_000_000)) for h in (hit, missed))
    assert prefetch_ms(small, of_hits) < prefetch_ms(small) < prefetch_ms(small, of_misses)


def test_hundreds_of_tables_are_planned_in_seconds() -> None:
    tables = [table(f"t{k}", 1_000_000 + 100_003 * k) for k in range(200)]
    made = planner("64xH100")
    chosen = planned(made, model(tables, INT4))
    assert {sharding.compute_kernel for sharding in chosen.values()} == {CACHED}
    assert sum(t.by_kind["store"] for t in made.report().tables) == 35 * sum(t.num_embeddings for t in tables)
