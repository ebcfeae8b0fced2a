"""TorchRec's quantized-inference flow with packed collections: shard_quant_model on one and two ranks."""

import pytest
import torch
from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingPlan
from torchrec.fx import Tracer
from torchrec.inference.modules import shard_quant_model
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.inference.sharded.random_collections import batch, collection, expected
from tests.inference.sharded.test_sharded_collection import close
from torchrec_mpe.distributed.planner.packed_placement import place_tables
from torchrec_mpe.inference.sharded.placement import codings_of_tables
from torchrec_mpe.inference.sharded.sharded_collection import LEAF_MODULES, ShardedPackedEmbeddingBagCollection

TABLES = [f"t{k}" for k in range(5)]


class Model(nn.Module):
    """A collection in a model."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.ebc(features).values()


def constraints(sharding_type: str) -> dict[str, ParameterConstraints]:
    return {t: ParameterConstraints(sharding_types=[sharding_type], compute_kernels=["quant"]) for t in TABLES}


@pytest.mark.supports("shard_quant_model with PackedEmbeddingBagCollectionSharder", "CPU")
@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("coded", [False, True])
def test_shard_quant_model(coded: bool, sharding_type: str, world_size: int) -> None:
    """Also with sharding_device="meta", TorchRec's default, with which its own collections have no values."""
    ebc, dense = collection(1, coded=coded)
    kjt = batch(dense, 5)
    for sharding_device in ("cpu", "meta"):
        sharded, plan = shard_quant_model(
            Model(ebc),
            world_size=world_size,
            compute_device="cpu",
            sharding_device=sharding_device,
            sharders=[mpe.PackedEmbeddingBagCollectionSharder()],
            constraints=constraints(sharding_type),
        )
        assert isinstance(sharded.ebc, ShardedPackedEmbeddingBagCollection)
        assert {sharding.sharding_type for sharding in plan.plan["ebc"].values()} == {sharding_type}
        assert len(sharded.ebc.device_bytes) == world_size
        close(sharded(kjt), expected(ebc, dense, kjt))
        scripted = torch.jit.script(torch.fx.GraphModule(sharded, Tracer(leaf_modules=LEAF_MODULES).trace(sharded)))
        assert torch.equal(scripted(kjt), sharded(kjt))


def test_without_constraints_torchrecs_planner_decides() -> None:
    ebc, dense = collection(1)
    kjt = batch(dense, 5)
    sharder = mpe.PackedEmbeddingBagCollectionSharder()
    sharded, _ = shard_quant_model(
        Model(ebc), world_size=2, compute_device="cpu", sharding_device="cpu", sharders=[sharder]
    )
    close(sharded(kjt), expected(ebc, dense, kjt))
    # What the planner reads of a table's bytes is never less than it takes.
    parameters = sharder.shardable_parameters(ebc)
    sizes = {table.name: table.total for table in ebc.size_report().tables}
    assert {name: p.numel() * p.element_size() >= sizes[name] for name, p in parameters.items()} == dict.fromkeys(
        TABLES, True
    )


@pytest.mark.parametrize("part", [2.0, 0.5])
@pytest.mark.parametrize("coded", [False, True])
def test_the_plan_of_replan(coded: bool, part: float) -> None:
    """Exact bytes and uneven ranges, or DATA_PARALLEL where one device holds all."""
    ebc, dense = collection(1, coded=coded)
    tables = codings_of_tables([ebc.packed_tables()])
    memory = int(ebc.size_report().total * part) + 1000
    placement = place_tables(tables, memory, 3, learned_zero_rows=True)
    sharded, _ = shard_quant_model(
        Model(ebc),
        world_size=3,
        compute_device="cpu",
        sharders=[mpe.PackedEmbeddingBagCollectionSharder()],
        sharding_plan=ShardingPlan({"ebc": placement.sharding_plan("cpu")}),
    )
    assert len(sharded.ebc.device_bytes) == placement.num_devices == (1 if part > 1 else 2)
    kjt = batch(dense, 5)
    close(sharded(kjt), expected(ebc, dense, kjt))


def test_misuse_is_named() -> None:
    ebc, _ = collection(1)
    sharder = mpe.PackedEmbeddingBagCollectionSharder()
    env = ShardingEnv.from_local(2, 0)
    plan = place_tables(
        codings_of_tables([ebc.packed_tables()]), ebc.size_report().total * 2 // 3, 2, learned_zero_rows=True
    ).sharding_plan("cpu")
    with pytest.raises(ValueError, match=r"model\.ebc: the sharding plan has no table t1"):
        sharder.shard(ebc, EmbeddingModuleShardingPlan({t: plan[t] for t in plan if t != "t1"}), env, None, "model.ebc")
    plan["t1"].sharding_type = "column_wise"
    with pytest.raises(ValueError, match="table t1: packed tables are sharded table_wise or row_wise"):
        sharder.shard(ebc, plan, env)
    plan["t1"].sharding_type = "row_wise"
    plan["t1"].sharding_spec.shards[0].shard_offsets[1] = 4
    with pytest.raises(ValueError, match="table t1: the columns of packed rows cannot be split"):
        sharder.shard(ebc, plan, env)
    with pytest.raises(ValueError, match="on the meta device"):
        sharder.shard(ebc.to("meta"), plan, env)
    env.process_group = object()
    with pytest.raises(NotImplementedError, match="not over a process group"):
        sharder.shard(ebc, plan, env)
