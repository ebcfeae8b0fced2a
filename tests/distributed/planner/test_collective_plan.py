"""One plan for all ranks, or one error."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, PlannerErrorType, Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe
from tests.distributed.ranks import Ranks


def _planned(rows: int, **constraint: Any) -> tuple[str, Any]:
    table = EmbeddingBagConfig(name="t", num_embeddings=rows, embedding_dim=16, feature_names=["f"])
    model = nn.Sequential(mpe.MPEEmbeddingBagCollection([table], device=torch.device("meta")))
    topology = Topology(world_size=2, compute_device="cuda", hbm_cap=10**9)
    constraints = {"t": ParameterConstraints(**constraint)} if constraint else None
    planner = mpe.MPEShardingPlanner(topology, batch_size=64, constraints=constraints)
    try:
        plan = planner.collective_plan(model, mpe.sharders({"optimizer": EmbOptimType.EXACT_SGD}))
    except PlannerError as error:
        return str(error), error.error_type.value
    except ValueError as error:
        return str(error), None
    return str(plan), dist.get_rank()


def planned() -> list[tuple[str, Any]]:
    fused = {"sharding_types": ["data_parallel"], "compute_kernels": ["fused"]}
    return [_planned(1000), _planned(10**9), _planned(1000, **fused)]


@pytest.fixture(scope="module")
def by_rank(two_ranks: Ranks) -> list[list[tuple[str, Any]]]:
    return two_ranks.run(planned)


def test_all_ranks_have_the_same_plan(by_rank: list[Any]) -> None:
    assert by_rank[0][0][0] == by_rank[1][0][0]
    assert [rank[0][1] for rank in by_rank] == [0, 1]


def test_all_ranks_hear_that_nothing_fits(by_rank: list[Any]) -> None:
    message, kind = by_rank[0][1]
    assert by_rank[1][1] == (message, kind) and kind in [k.value for k in PlannerErrorType] and "64.00 GB" in message


def test_all_ranks_hear_of_a_constraint_that_cannot_be(by_rank: list[Any]) -> None:
    assert by_rank[0][2] == by_rank[1][2] and by_rank[0][2][1] is None and "table t" in by_rank[0][2][0]
