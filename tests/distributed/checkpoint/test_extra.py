"""State of schedulers and the like."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR, SequentialLR

import torchrec_mpe as mpe
from tests.distributed.checkpoint.runs import Run, Training
from torchrec_mpe.distributed.checkpoint.checkpoint import Checkpoint
from torchrec_mpe.distributed.checkpoint.extra import (
    as_json,
    check_extra,
    extra_state,
    from_json,
    of_ranks,
    set_extra,
)
from torchrec_mpe.modules.embedding_bag_collection import Phase

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "steps": lambda optimizer: MultiStepLR(optimizer, [2, 6], gamma=0.5),
    "cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False),
    "sequence": lambda optimizer: SequentialLR(
        optimizer, [CosineAnnealingLR(optimizer, 3), MultiStepLR(optimizer, [1])], milestones=[4]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_go_on(kind: str, tmp_path: Path, one_rank: None) -> None:
    def learning_rates(schedule: LRScheduler, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            schedule.optimizer.step()
            schedule.step()
            rates.append(schedule.optimizer.param_groups[0]["lr"])
        return rates

    run = Run("plain")
    training = Training(run)
    schedule = SCHEDULES[kind](training.optimizer)
    learning_rates(schedule, 3)
    checkpoints = mpe.Checkpoints(tmp_path)
    checkpoints.save(training.model, training.optimizer, step=3, extra={"schedule": schedule})
    expected = learning_rates(schedule, 5)
    found = checkpoints.newest()
    assert found is not None and len(set(expected)) > 1
    other = Training(run)
    resumed = SCHEDULES[kind](other.optimizer)
    checkpoints.load(other.model, other.optimizer, found, extra={"schedule": resumed})
    assert learning_rates(resumed, 5) == expected


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "x"]}, {3: 1, 5: {"b": [[]]}}, {"n": float("inf")}])
def test_json_and_back(value: Any) -> None:
    assert from_json(json.loads(json.dumps(as_json("value", value)))) == value


def test_what_has_no_json_is_named() -> None:
    with pytest.raises(TypeError, match=r"schedule.a\[1\].b is a Tensor"):
        as_json("schedule", {"a": [1, {"b": torch.zeros(1)}]})
    with pytest.raises(TypeError, match=r"position.file is a PosixPath"):
        as_json("position", {"file": Path("x")})


def test_ranks_with_other_parameter_groups_have_schedules_of_their_own() -> None:
    def schedule(groups: int) -> torch.optim.lr_scheduler.LRScheduler:
        parameters = [{"params": [torch.zeros(1)], "lr": 1.0 + k} for k in range(groups)]
        return torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD(parameters), 0.5)

    saved = [schedule(1), schedule(2)]
    saved[1].step()
    _, first = extra_state({"s": saved[0], "same": schedule(1)})
    _, second = extra_state({"s": saved[1], "same": schedule(1)})
    by_rank = json.loads(json.dumps(of_ranks([first, second])))
    assert list(by_rank) == ["s"]
    manifest = {"extra": first, "extra_of_ranks": by_rank}
    checkpoint = Checkpoint(Path("c"), 1, Phase.PLAIN, {}, 2, None, manifest)
    for rank, before in enumerate(saved):
        again = schedule(1 + rank)
        check_extra({"s": again}, {}, checkpoint, {}, rank, 2)
        set_extra({"s": again}, {}, checkpoint, rank, 2)
        assert again.state_dict() == before.state_dict()
    with pytest.raises(ValueError, match=r"'s' has learning rates of 1 parameter groups in the checkpoint, .* has 2"):
        check_extra({"s": schedule(2)}, {}, checkpoint, {}, 1, 4)
