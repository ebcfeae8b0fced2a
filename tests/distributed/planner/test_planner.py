"""MPEShardingPlanner: what it chooses, what it refuses, and what it says when nothing fits."""

import re

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingOffloadStats
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType, Topology
from torchrec.distributed.types import CacheParams, ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

import torchrec_mpe as mpe
from torchrec_mpe.distributed.embeddingbag import MPEEmbeddingBagCollectionSharder
from torchrec_mpe.distributed.planner.cluster import parse_topology
from torchrec_mpe.distributed.planner.planner import MPEShardingPlanner
from torchrec_mpe.distributed.planner.storage_reservation import MPEStorageReservation
from torchrec_mpe.modules.embedding_bag_collection import Phase

TW, RW, CW, GRID, DP = (
    kind.value
    for kind in (
        ShardingType.TABLE_WISE,
        ShardingType.ROW_WISE,
        ShardingType.COLUMN_WISE,
        ShardingType.GRID_SHARD,
        ShardingType.DATA_PARALLEL,
    )
)
FUSED, DENSE, FUSED_UVM, UVM_CACHING = (
    kernel.value
    for kernel in (
        EmbeddingComputeKernel.FUSED,
        EmbeddingComputeKernel.DENSE,
        EmbeddingComputeKernel.FUSED_UVM,
        EmbeddingComputeKernel.FUSED_UVM_CACHING,
    )
)
SHARDERS = mpe.sharders({"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})


def table(name: str, rows: int, dim: int = 64, features: int = 1, pooling: PoolingType = PoolingType.SUM) -> EmbeddingBagConfig:  # fmt: skip  # noqa: E501
    names = [f"{name}_f{k}" for k in range(features)]
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=names, pooling=pooling)


def model(*tables: EmbeddingBagConfig) -> nn.Module:
    return nn.ModuleDict({"ebc": mpe.MPEEmbeddingBagCollection(list(tables), device=torch.device("meta"))})


def planner(topology: Topology | str, **settings: object) -> MPEShardingPlanner:
    chosen = parse_topology(topology) if isinstance(topology, str) else topology
    arguments = {"batch_size": 512, "stats": [], "debug": False, "phase": Phase.SEARCH, **settings}
    return MPEShardingPlanner(chosen, **arguments)  # type: ignore[arg-type]


def planned(made: MPEShardingPlanner, module: nn.Module) -> dict[str, ParameterSharding]:
    return dict(made.plan(module, SHARDERS).plan["ebc"])


def test_rows_stay_in_fused_tbes_where_torchrec_also_proposes_dense_ones() -> None:
    module = model(table("a", 50), table("b", 20))
    theirs = EmbeddingEnumerator(parse_topology("2xCPU:8GB"), 512).enumerate(module, SHARDERS)
    assert DENSE in {option.compute_kernel for option in theirs}
    made = planner("2xCPU:8GB")
    ours, _, _ = made.options(module, SHARDERS)
    assert {(option.sharding_type, option.compute_kernel) for option in ours} == {(TW, FUSED), (RW, FUSED)}
    assert {sharding.compute_kernel for sharding in planned(made, module).values()} == {FUSED}


def test_constraints_are_respected() -> None:
    module = model(table("a", 5_000), table("b", 5_000), table("c", 5_000, dim=128))
    constraints = {
        "a": ParameterConstraints(sharding_types=[RW]),
        "b": ParameterConstraints(sharding_types=[DP]),
        "c": ParameterConstraints(sharding_types=[CW], min_partition=32),
    }
    chosen = planned(planner("4xH100", constraints=constraints), module)
    assert (chosen["a"].sharding_type, chosen["a"].compute_kernel) == (RW, FUSED)
    assert (chosen["b"].sharding_type, chosen["b"].compute_kernel) == (DP, DENSE)
    assert (chosen["c"].sharding_type, chosen["c"].compute_kernel) == (CW, FUSED)
    assert len(chosen["c"].sharding_spec.shards) == 4
    assert constraints["a"].compute_kernels is None, "the user's constraints are not changed"


def test_a_dense_kernel_means_data_parallel() -> None:
    constraints = {"a": ParameterConstraints(compute_kernels=[DENSE])}
    chosen = planned(planner("2xH100", constraints=constraints), model(table("a", 500)))
    assert (chosen["a"].sharding_type, chosen["a"].compute_kernel) == (DP, DENSE)


def test_grid_sharding_is_never_proposed_for_mean_pooling() -> None:
    mean, summed = table("m", 5_000, 256, pooling=PoolingType.MEAN), table("s", 5_000, 256)
    allowed = ParameterConstraints(sharding_types=[GRID, TW], min_partition=128)
    topology = parse_topology("4xH100", devices_per_host=2)
    made = planner(topology, constraints={"m": allowed, "s": allowed})
    options, _, _ = made.options(model(mean, summed), SHARDERS)
    assert {option.sharding_type for option in options if option.name == "m"} == {TW}
    assert {option.sharding_type for option in options if option.name == "s"} == {TW, GRID}
    with pytest.raises(ValueError, match="table m has mean pooling, which TorchRec computes wrongly"):
        planned(planner(topology, constraints={"m": ParameterConstraints(sharding_types=[GRID])}), model(mean))


def test_data_parallel_with_fused_is_refused_with_the_way_out() -> None:
    constraints = {"a": ParameterConstraints(sharding_types=[DP], compute_kernels=[FUSED])}
    with pytest.raises(ValueError, match=r"table a is constrained .* do not go together on cuda: data_parallel needs"):
        planned(planner("2xH100", constraints=constraints), model(table("a", 500)))


def test_pooling_factors_are_per_feature() -> None:
    module = model(table("a", 5_000, features=3))
    one = ParameterConstraints(pooling_factors=[4.0])
    options, _, _ = planner("2xH100", constraints={"a": one}).options(module, SHARDERS)
    assert options[0].input_lengths == [4.0, 4.0, 4.0]
    two = ParameterConstraints(pooling_factors=[4.0, 1.0])
    with pytest.raises(ValueError, match=r"table a has 3 features \(a_f0, a_f1, a_f2\), its constraints 2 pooling_fac"):
        planned(planner("2xH100", constraints={"a": two}), module)


def test_unknown_constraint_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    planned(planner("2xH100", constraints={"tabel": ParameterConstraints()}), model(table("a", 500)))
    assert "constraints for tabel: the model has no such table" in caplog.text


def test_search_costs_time_and_memory_that_the_plain_phase_does_not() -> None:
    module = model(table("a", 5_000_000))
    constraints = {"a": ParameterConstraints(sharding_types=[TW], pooling_factors=[10.0])}
    reports = {}
    for phase in (Phase.PLAIN, Phase.RETRAIN, Phase.SEARCH):
        made = planner("2xH100", constraints=constraints, phase=phase)
        planned(made, module)
        reports[phase] = made.report()
    plain, retrain, search = (reports[phase].tables[0].by_kind for phase in reports)
    assert plain["activations"] == plain["gradients"] == plain["row_map"] == 0
    assert (retrain["row_map"], search["row_map"]) == (5_000_000, 10_000_000)
    # 2 ranks x 512 examples x 10 ids of 64 float32 elements, held as rows and looked up without regard to repetitions.
    assert search["activations"] == 2 * 512 * 10 * 64 * 4
    assert search["gradients"] > 2 * search["activations"]
    assert search["optimizer_state"] == 5_000_000 * 4
    # Forward 4 and backward 5 times over the rows, and the map twice, at 3.35 TB/s.
    added_ms = (9 * 2 * 512 * 10 * 64 * 4 + 2 * 2 * 512 * 10 * 2) / 3.35e12 * 1e3
    difference = max(reports[Phase.SEARCH].step_ms) - max(reports[Phase.PLAIN].step_ms)
    assert difference == pytest.approx(added_ms, rel=1e-6)


def test_reservation_leaves_the_dense_network_its_memory() -> None:
    module = nn.ModuleDict({"ebc": model(table("a", 500))["ebc"], "dense": nn.Linear(1000, 1000)})
    topology = parse_topology("2xH100")
    reserved = MPEStorageReservation(0.25).reserve(topology, 512, module, SHARDERS)
    assert reserved.devices[0].storage.hbm == 60 * 10**9 - 6 * 4 * (1000 * 1000 + 1000)
    assert topology.devices[0].storage.hbm == 80 * 10**9
    on_cpu = MPEStorageReservation(0.25).reserve(parse_topology("2xCPU:80GB"), 512, module, SHARDERS)
    assert on_cpu.devices[1].storage.ddr == 60 * 10**9 - 6 * 4 * (1000 * 1000 + 1000)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1.5"):
        MPEStorageReservation(1.5)


def test_when_nothing_fits_the_error_lists_bytes_and_changes_that_fit() -> None:
    # 9 tables of 26.4 GB and more on 4 devices of 27.2 GB.
    module = model(*(table(f"t{k}", 100_000_000) for k in range(9)))
    with pytest.raises(PlannerError) as raised:
        planned(planner("4xV100"), module)
    message = str(raised.value)
    assert raised.value.error_type in (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS)
    assert message.startswith("no sharding plan fits 4 devices: the tables need")
    listed = re.findall(r"^t\d +100,000,000 +64 .*25\.60 GB +400\.00 MB +200\.00 MB", message, re.MULTILINE)
    assert len(listed) == 9
    devices = int(re.search(r"- (\d+) devices of this kind instead of 4", message)[1])  # type: ignore[index]
    assert planned(planner(parse_topology(f"{devices}xV100", devices_per_host=4)), module)
    with pytest.raises(PlannerError):
        planned(planner(parse_topology(f"{devices - 4}xV100", devices_per_host=4)), module)
    assert "rows in host memory behind a cache (compute kernel fused_uvm_caching) for" in message
    # 15% of 4 devices of 32 GB.
    kept = "MPEStorageReservation has kept 19.20 GB (15% of each device first), which storage_reservation= changes"
    assert f"for them after {kept}" in message
    uvm = ParameterConstraints(compute_kernels=["fused", "fused_uvm_caching"])
    assert planned(planner("4xV100", constraints={f"t{k}": uvm for k in range(9)}), module)


def test_when_the_batch_is_too_large_a_smaller_one_is_named() -> None:
    module = model(table("a", 1_000_000))
    constraints = {"a": ParameterConstraints(pooling_factors=[200.0])}
    with pytest.raises(PlannerError) as raised:
        planned(planner("2xH100", batch_size=1 << 20, constraints=constraints), module)
    batch = int(re.search(r"- a batch of (\d+) examples a rank instead of 1048576", str(raised.value))[1])  # type: ignore[index]
    assert planned(planner("2xH100", batch_size=batch, constraints=constraints), module)
    with pytest.raises(PlannerError):
        planned(planner("2xH100", batch_size=2 * batch, constraints=constraints), module)
    assert "devices of this kind" not in str(raised.value), "more devices look up more ids"


def test_when_constraints_are_too_tight_the_tables_are_named() -> None:
    module = model(table("large", 500_000_000), table("small", 1_000))
    constraints = {
        "large": ParameterConstraints(sharding_types=[TW]),
        "small": ParameterConstraints(sharding_types=[TW]),
    }
    with pytest.raises(PlannerError) as raised:
        planned(planner("4xH100", constraints=constraints), module)
    assert "- other sharding types than the constraints': large row_wise" in str(raised.value)
    assert "of table large (table_wise)" in str(raised.value)


def test_what_a_sharder_allows_is_all_that_is_planned() -> None:
    class OneWay(MPEEmbeddingBagCollectionSharder):
        def __init__(self, types: list[str], kernels: list[str]) -> None:
            super().__init__({"optimizer": EmbOptimType.EXACT_SGD})
            self._types, self._kernels = types, kernels

        def sharding_types(self, compute_device_type: str) -> list[str]:
            return self._types

        def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
            return self._kernels

    module = model(table("a", 5_000, dim=256))
    for types, kernels in (([CW], [FUSED]), ([GRID], [FUSED]), ([DP], [DENSE]), ([RW], [FUSED_UVM])):
        chosen = planner("2xH100").plan(module, [OneWay(types, kernels)]).plan["ebc"]["a"]
        assert (chosen.sharding_type, chosen.compute_kernel) == (types[0], kernels[0])
    with pytest.raises(ValueError, match=r"^table a: OneWay allows no sharding type and .* on cuda: \{\}"):
        planner("2xH100").plan(module, [OneWay([], [])])
    made = planner("2xH100", constraints={"a": ParameterConstraints(sharding_types=[TW])})
    with pytest.raises(ValueError, match=r"^table a is constrained .* table_wise, of which OneWay allows none"):
        made.plan(module, [OneWay([RW], [FUSED])])


def test_offloading_proposers_may_offload() -> None:
    histogram = torch.linspace(0, 0.9, 10)
    stats = EmbeddingOffloadStats(0.2, 500_000, histogram, 4_000_000)
    offloaded = {"a": ParameterConstraints(cache_params=CacheParams(stats=stats))}
    module = model(table("a", 80_000_000), table("b", 5_000))
    made = planner("1xV100", constraints=offloaded, proposer=EmbeddingOffloadScaleupProposer(), phase=Phase.PLAIN)
    chosen = planned(made, module)
    assert {name: sharding.compute_kernel for name, sharding in chosen.items()} == {"a": UVM_CACHING, "b": FUSED}
    options, _, _ = planner("1xV100", constraints=offloaded).options(module, SHARDERS)
    assert {option.compute_kernel for option in options} == {FUSED}, "nobody asked for it"


def test_statistics_call_constrained_what_the_user_constrained() -> None:
    told: list[dict[str, ParameterConstraints]] = []

    class Kept(EmbeddingStats):
        def log(self, *args: object, constraints: object = None, **kwargs: object) -> None:
            told.append(constraints)  # type: ignore[arg-type]

    given = ParameterConstraints(compute_kernels=[FUSED])
    planned(planner("2xH100", constraints={"a": given}, stats=Kept()), model(table("a", 500), table("b", 500)))
    assert {name: constraint.compute_kernels for name, constraint in told[0].items()} == {"a": [FUSED], "b": None}


def test_report_needs_a_plan() -> None:
    with pytest.raises(RuntimeError, match="call plan"):
        planner("2xH100").report()


def test_a_cpu_s_memory_is_the_host_s() -> None:
    made = planner("2xCPU:8GB")
    planned(made, model(table("a", 500_000)))
    report = made.report()
    assert report.host_bytes == (0, 0)
    assert sum(report.device_bytes) == sum(report.tables[0].by_kind.values())
    assert report.tables[0].by_kind["frequency_order"] == 500_000 * 4


def test_a_failed_plan_leaves_none_to_report() -> None:
    made = planner("1xH100")
    planned(made, model(table("a", 500)))
    with pytest.raises(PlannerError):
        planned(made, model(table("a", 900_000_000)))
    with pytest.raises(RuntimeError, match="call plan"):
        made.report()


def test_report_adds_up() -> None:
    made = planner("4xH100")
    chosen = planned(made, model(table("a", 50_000_000), table("b", 3_000), table("c", 700_000, 32)))
    report = made.report()
    assert {t.name: t.ranks for t in report.tables} == {name: tuple(s.ranks) for name, s in chosen.items()}
    assert sum(report.device_bytes) == sum(t.device_bytes for t in report.tables)
    assert [t.name for t in report.tables] == ["a", "c", "b"]
    assert report.available == (68 * 10**9,) * 4
    assert sum(t.by_kind["rows"] for t in report.tables) == 4 * (50_000_000 * 64 + 3_000 * 64 + 700_000 * 32)
