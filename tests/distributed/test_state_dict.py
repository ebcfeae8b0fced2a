"""State dicts of sharded models, with torch.distributed.checkpoint between any two shardings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.distributed.equality import (
    CW,
    DP,
    GRID,
    RW,
    TW,
    TWCW,
    TWRW,
    Case,
    enter,
    local_batch,
    prepared_model,
    shard,
    two_steps,
)
from tests.distributed.ranks import Ranks

EVALUATED = 5
CASES = [
    Case((TWRW, TWCW, GRID, RW, CW, DP, TW)),
    Case((CW, RW, GRID, TWCW), phase="retrain", weighted=True),
    Case((RW, TWRW, TW, CW), phase="plain"),
]


def save(case: Case, folder: str) -> np.ndarray[Any, Any]:
    """Train sharded for two steps and save; what the model then says."""
    model = shard(prepared_model(case), case)
    enter(model, case)
    dense = [p for name, p in model.named_parameters() if "mpe." in name or "linear." in name]
    two_steps(model, case, dist.get_rank(), dist.get_world_size(), dense)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    return predictions(model, case, dist.get_rank(), dist.get_world_size())


def load(case: Case, folder: str) -> np.ndarray[Any, Any]:
    """Load into a model sharded in another way; what it then says."""
    other = Case(case.sharding[::-1], phase=case.phase, weighted=case.weighted)
    model = shard(prepared_model(other), other)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    return predictions(model, case, dist.get_rank(), dist.get_world_size())


def predictions(model: torch.nn.Module, case: Case, rank: int, world_size: int) -> np.ndarray[Any, Any]:
    features, _ = local_batch(EVALUATED, case, rank, world_size)
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model.eval()(features).numpy()
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loads_into_one_process_and_into_another_plan(case: Case, four_ranks: Ranks, tmp_path: Path) -> None:
    want = np.concatenate(four_ranks.run(save, case, str(tmp_path)))
    alone = prepared_model(case)
    before = predictions(alone, case, 0, 1)
    state = {"model": alone.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    alone.load_state_dict(state["model"])
    np.testing.assert_allclose(predictions(alone, case, 0, 1), want, rtol=1e-6, atol=2e-6)
    assert not np.allclose(before, want, atol=1e-3)
    again = np.concatenate(four_ranks.run(load, case, str(tmp_path)))
    np.testing.assert_allclose(again, want, rtol=1e-6, atol=2e-6)
