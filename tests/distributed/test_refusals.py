"""What TorchRec computes wrongly or cannot do is refused, with the table's name and the way out."""

import pytest
import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

import torchrec_mpe as mpe
from tests.distributed.equality import DP, GRID, RW, TW, Case, Head, prepared_model, shard, tables
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.embeddingbag import ShardedMPEEmbeddingBagCollection
from torchrec_mpe.precision.from_frequencies import uniform_precision


def message_of_sharding(case: Case) -> str:
    try:
        shard(prepared_model(case), case)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("phase", ["plain", "search", "retrain"])
def test_grid_with_mean(phase: str, four_ranks: Ranks) -> None:
    case = Case((TW, GRID, RW, TW), phase=phase, mean_tables=("t1", "t2"))
    for message in four_ranks.run(message_of_sharding, case):
        assert message.startswith("table t1 has mean pooling") and "use another sharding type for it" in message


def sharded(case: Case, table: str, sharding_type: str, kernel: str) -> ShardedMPEEmbeddingBagCollection:
    """A collection sharded by a plan that a user wrote, one table unlike the others; refusals come before any group."""
    plan = {t.name: ParameterSharding(TW, "fused", [0]) for t in tables(case)}
    plan[table] = ParameterSharding(sharding_type, kernel, [0])
    return ShardedMPEEmbeddingBagCollection(prepared_model(case).ebc, plan, env=None)


@pytest.mark.parametrize("kernel", ["fused", "fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize("phase", ["plain", "search"])
def test_data_parallel_with_a_fused_kernel(phase: str, kernel: str) -> None:
    with pytest.raises(ValueError, match=rf"table t2 is data-parallel with .* {kernel}, .* use the kernel dense"):
        sharded(Case((TW,), phase=phase), "t2", DP, kernel)


@pytest.mark.parametrize("phase", ["search", "retrain"])
@pytest.mark.parametrize("kernel", ["key_value", "ssd_virtual_table", "dram_virtual_table", "fused_triton"])
def test_kernels_without_unpooled_rows(kernel: str, phase: str) -> None:
    with pytest.raises(ValueError, match=rf"table t1 has the compute kernel {kernel}, .* use fused, fused_uvm_caching"):
        sharded(Case((TW,), phase=phase), "t1", RW, kernel)


def test_weighted_mean() -> None:
    case = Case((TW,), phase="plain", weighted=True, mean_tables=("t3",))
    counts = {t.name: torch.ones(t.num_embeddings, dtype=torch.int64) for t in tables(case)}
    expected = r"table t3 \(features b\) has mean pooling in a weighted collection: .* use sum pooling"
    with pytest.raises(ValueError, match=expected):
        mpe.prepare_search_(Head(case), counts)
    with pytest.raises(ValueError, match=expected):
        mpe.prepare_retrain_(Head(case), uniform_precision(tables(case), 4))
    with pytest.raises(ValueError, match=r"table t3 has mean pooling in a weighted collection: .* use sum pooling"):
        sharded(case, "t0", TW, "fused")


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.INT8])
def test_data_types(data_type: DataType) -> None:
    table = EmbeddingBagConfig(
        name="t", num_embeddings=4, embedding_dim=8, feature_names=["f"], pooling=PoolingType.SUM, data_type=data_type
    )
    model = mpe.MPEEmbeddingBagCollection([table])
    with pytest.raises(ValueError, match=f"table t has data type {data_type.value}: rows are trained in FP32"):
        mpe.prepare_search_(model, {"t": torch.ones(4, dtype=torch.int64)})
    with pytest.raises(ValueError, match=f"table t has data type {data_type.value}: rows are trained in FP32"):
        mpe.prepare_retrain_(model, uniform_precision([table], 4))


def test_stock_sharders_find_nothing_to_shard() -> None:
    """A user who forgets torchrec_mpe.sharders() learns of it from the planner."""
    from torchrec.distributed.sharding_plan import get_default_sharders

    case = Case((TW,))
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        constraints={t.name: ParameterConstraints(sharding_types=[TW]) for t in tables(case)},
    )
    plan = planner.plan(prepared_model(case), get_default_sharders())
    assert not plan.plan, "TorchRec's own sharder would pool rows without quantizing them"
