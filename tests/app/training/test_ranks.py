"""Evaluation and running statistics over several ranks, and a resume on another number of ranks."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.distributed.ranks import Ranks
from torchrec_mpe.app.training.loop import evaluate
from torchrec_mpe.app.training.phase_checkpoints import PhaseCheckpoints
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.distributed.batch_norms import average_batch_norms
from torchrec_mpe.errors import UserError

_SCORES = [0.5, -1.0, 2.0, 0.5, 3.0, -2.0, 0.25]
_LABELS = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0]


class _Data:
    """Seven rows, of which each rank gets every second one."""

    def batches(self, split: str, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        scores, labels = _SCORES[rank::world_size], _LABELS[rank::world_size]
        kjt = KeyedJaggedTensor.from_lengths_sync(
            ["f"], torch.empty(0, dtype=torch.int64), torch.zeros(len(labels)).long()
        )
        yield Batch(torch.tensor(scores).unsqueeze(1), kjt, torch.tensor(labels))


class _First(nn.Module):
    def forward(self, dense: torch.Tensor, sparse: Any) -> torch.Tensor:
        return dense[:, :1]


def _on_a_rank() -> tuple[dict[str, float], list[list[float]]]:
    rank = torch.distributed.get_rank()
    norm = nn.BatchNorm1d(2)
    norm.running_mean = torch.tensor([1.0 + rank, 5.0])
    norm.running_var = torch.tensor([4.0, 2.0 + 4 * rank])
    average_batch_norms(nn.Sequential(norm, nn.Linear(2, 1)))
    result = evaluate(_First(), _Data(), "test", torch.device("cpu"))  # type: ignore[arg-type]
    return result, [norm.running_mean.tolist(), norm.running_var.tolist()]


def test_evaluation_and_running_statistics_of_all_ranks(two_ranks: Ranks) -> None:
    results = two_ranks.run(_on_a_rank)
    # Positives 0.5, 3, 0.25 against negatives -1, 2, 0.5, -2: 2.5 + 4 + 2 of 12 pairs won.
    losses = torch.tensor([0.474077, 0.313262, 2.126928, 0.974077, 0.048587, 0.126928, 0.575939])
    for result, statistics in results:
        assert result["auc"] == pytest.approx(8.5 / 12)
        assert result["logloss"] == pytest.approx(losses.mean().item(), abs=1e-5)
        assert statistics == [[1.5, 5.0], [4.0, 4.0]]


@pytest.mark.parametrize(("batch", "refused"), [(40, True), (0, False)])
def test_another_number_of_ranks_only_between_epochs(batch: int, refused: bool) -> None:
    loaded: list[Any] = []
    found: Any = SimpleNamespace(path=Path("c"), world_size=4, position={"phase": 1, "epoch": 1, "batch": batch})
    checkpoints: Any = SimpleNamespace(load=lambda *arguments, **named: loaded.append(arguments))
    phase = PhaseCheckpoints(checkpoints, 1, 0, 10, found=found)
    nothing: Any = object()
    with process_group(torch.device("cpu")):
        if refused:
            with pytest.raises(UserError, match="on 4 ranks, and this job has 1"):
                phase.resume(nothing, nothing, nothing)
        else:
            assert phase.resume(nothing, nothing, nothing).epoch == 1
    assert len(loaded) == (not refused)
