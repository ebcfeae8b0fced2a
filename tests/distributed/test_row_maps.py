"""What a rank stores of what each row belongs to: its own rows, and no more."""

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.modules.embedding_configs import EmbeddingBagConfig

import torchrec_mpe as mpe
from tests.distributed.equality import CW, DP, RW, TW
from tests.distributed.ranks import Ranks

ROWS = {"ranked": 30_000, "mapped": 50_000}
DIM = 8


def _tables() -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=DIM, feature_names=[f"f_{n}"])
        for n, r in ROWS.items()
    ]


def _counts() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "ranked": torch.arange(ROWS["ranked"], 0, -1),
        "mapped": torch.randint(0, 100, (ROWS["mapped"],), generator=g),
    }


def _prepared(phase: str) -> nn.Module:
    model = nn.Sequential(mpe.MPEEmbeddingBagCollection(_tables(), device=torch.device("meta")))
    if phase == "search":
        mpe.prepare_search_(model, _counts())
    else:
        mpe.prepare_retrain_(model, mpe.precision_from_frequencies(_counts(), _tables(), ratio=20))
    return model


def _large_integer_bytes() -> int:
    """Bytes of all integer tensors of this process that are large enough to hold something for many rows."""
    gc.collect()
    seen: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) is torch.Tensor and not found.is_floating_point() and found.device.type == "cpu":
            storage = found.untyped_storage()
            if storage.nbytes() >= 10_000:
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def stored(sharding: str, phase: str) -> dict[str, Any]:

    before = _large_integer_bytes()
    sharders = mpe.sharders()
    constraints = {t: ParameterConstraints(sharding_types=[sharding], min_partition=4) for t in ROWS}
    topology = Topology(world_size=dist.get_world_size(), compute_device="cpu", hbm_cap=2**33)
    model = _prepared(phase.split(",")[0])
    plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).collective_plan(
        model, sharders, dist.GroupMember.WORLD
    )
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    if phase == "search, then retrain":
        mpe.prepare_retrain_(dmp, mpe.sample_precision(dmp))
    del model, plan
    held = _large_integer_bytes() - before
    maps = sum(row_map.nbytes for row_map in dmp.module[0].row_maps())
    # What is sharded is still whole where it is asked for.
    if phase == "search":
        ranks = mpe.sample_precision(dmp).tables["mapped"].order
    else:
        ranks = dmp.module[0].quantizers()[DIM].widths["mapped"].order
    assert ranks is not None
    return {"held": held, "maps": maps, "ranks": ranks.numpy()}


@pytest.mark.parametrize("phase", ["search", "retrain", "search, then retrain"])
@pytest.mark.parametrize("sharding", [TW, RW, CW, DP])
def test_each_rank_stores_what_its_own_rows_belong_to(two_ranks: Ranks, sharding: str, phase: str) -> None:
    by_rank = two_ranks.run(stored, sharding, phase)
    width = 2 if phase == "search" else 1  # int16 feature groups, uint8 candidates
    copies = 2 if sharding in (CW, DP) else 1  # every column shard looks up all rows
    assert sum(r["maps"] for r in by_rank) == copies * width * sum(ROWS.values())
    # Ranks of the rows whose ids are none, int32, once; nothing else of the tables' size is left.
    expected = sum(r["maps"] for r in by_rank) + 4 * ROWS["mapped"]
    assert sum(r["held"] for r in by_rank) == expected
    if sharding == RW:
        assert abs(by_rank[0]["held"] - by_rank[1]["held"]) <= 4 * 64
    counts = _counts()["mapped"]
    for result in by_rank:
        order = torch.empty(ROWS["mapped"], dtype=torch.int64)
        order[torch.from_numpy(result["ranks"]).long()] = torch.arange(ROWS["mapped"])
        assert bool((counts[order].diff() <= 0).all()), "by rank, counts must not increase"
