"""The step log's lines, when they are written, and what a kill may leave."""

import json
from pathlib import Path

import pytest
import torch

from torchrec_mpe.app.training.step_log import StepLog
from torchrec_mpe.errors import UserError


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_losses_are_written_when_enough_are_together(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    log = StepLog(2, restart=1)
    log.write_to(file)
    assert log.place == "before the first step"
    losses = [0.1, 1 / 3, 2.5]
    for step, loss in enumerate(losses, 1):
        log.add("search", step, torch.tensor(loss, dtype=torch.float32))
        assert (len(lines(file)) if file.exists() else 0) == step // 2 * 2
    assert log.place == "after step 3 of search"
    log.evaluation("search", 3, 0.75)
    written = lines(file)
    # Full precision: the float32 comes back from its decimal digits.
    assert [torch.tensor(line["loss"]).item() for line in written[:3]] == torch.tensor(losses).tolist()
    assert [line["step"] for line in written] == [1, 2, 3, 3]
    assert written[3] == {"phase": "search", "step": 3, "validation_auc": 0.75, "restart": 1}


def test_a_line_cut_off_by_a_kill_does_not_swallow_the_next(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_text('{"phase": "search", "st')
    log = StepLog(1)
    log.write_to(file)
    log.add("search", 7, torch.tensor(0.5))
    log.add("search", 8, torch.tensor(0.25))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()[1:]] == [7, 8]


def test_a_loss_that_is_not_finite_ends_training_and_is_logged(tmp_path: Path) -> None:
    log = StepLog(2)
    log.write_to(tmp_path / "steps.jsonl")
    log.add("retrain 1 of 2", 1, torch.tensor(float("nan")))
    with pytest.raises(UserError, match="not finite at step 1 of retrain 1 of 2"):
        log.add("retrain 1 of 2", 2, torch.tensor(0.5))
    assert (tmp_path / "steps.jsonl").read_text().count("\n") == 2


def test_ranks_without_a_file_write_nothing(tmp_path: Path) -> None:
    log = StepLog(1)
    log.add("search", 1, torch.tensor(0.5))
    log.evaluation("search", 1, 0.5)
    assert not list(tmp_path.iterdir())
