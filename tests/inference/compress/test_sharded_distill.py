"""Distillation over two ranks."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import torchrec_mpe as mpe
from tests.distributed.equality import CW, DP, INITIALIZATION, RW, TW, Case, Head, local_batch, shard, tables
from tests.distributed.ranks import Ranks
from tests.inference.compress.packed import packed
from torchrec_mpe.inference.compress.distill import distill_

CASE = Case((TW, RW, CW, DP), phase="plain")
STEPS = range(4)


class NormedHead(Head):
    """With batch normalization, whose statistics are of each rank's own batches."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.norm = nn.BatchNorm1d(self.linear.in_features)
        self.linear = nn.Sequential(self.norm, self.linear)  # type: ignore[assignment]


def distilled(kind: type[Head], scores: list[list[float]], world_size: int = 0) -> dict[str, Any]:
    """On this group or, with a world size, in one process over the batches of so many ranks.

    Args:
        kind (type): of both models.
        scores (List[List[float]]): by rank, before and after; none for no score.
    """
    teacher: nn.Module = kind(CASE)
    rows = {t.name: INITIALIZATION.fill_(torch.empty(t.num_embeddings, t.embedding_dim), t.name) for t in tables(CASE)}
    coded = kind(CASE)
    coded.load_state_dict(teacher.state_dict())
    coded.ebc = packed(tables(CASE), rows)
    if not world_size:
        teacher = shard(teacher, CASE)
    mpe.reset_rows_(teacher, INITIALIZATION)
    rank, size = (0, 1) if world_size else (dist.get_rank(), dist.get_world_size())
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    mine = list(scores[rank]) if scores else []
    result = distill_(
        coded,
        teacher,
        [local_batch(step, CASE, rank, size)[0] for step in STEPS],
        learning_rate=0.01,
        score=(lambda: mine.pop(0)) if mine else None,
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())
    return {
        "state": {name: value.float().numpy() for name, value in coded.state_dict().items()},
        "losses": result.losses,
        "kept": result.kept,
    }


def test_equals_one_process(two_ranks: Ranks) -> None:
    """Of a network without batch normalization, where the mean of the ranks' gradients is the whole batch's."""
    want = distilled(Head, [], world_size=2)
    for rank in two_ranks.run(distilled, Head, []):
        np.testing.assert_allclose(rank["losses"], want["losses"], rtol=1e-5)
        for name, value in rank["state"].items():
            np.testing.assert_allclose(value, want["state"][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_ranks_end_equal(two_ranks: Ranks) -> None:
    one, two = two_ranks.run(distilled, NormedHead, [])
    for name, value in one["state"].items():
        np.testing.assert_array_equal(value, two["state"][name], err_msg=name)


def test_ranks_decide_by_the_mean_score(two_ranks: Ranks) -> None:
    for scores, kept in (([[0.4, 0.5], [0.4, 0.2]], False), ([[0.4, 0.3], [0.4, 0.6]], True)):
        for rank in two_ranks.run(distilled, Head, scores):
            assert rank["kept"] is kept
