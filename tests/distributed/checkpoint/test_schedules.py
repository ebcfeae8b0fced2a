"""A resumed run under every optimizer, wrapper and schedule of torch and TorchRec: what follows is as uninterrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

import torchrec_mpe as mpe
from tests.distributed.checkpoint.runs import RW, TW, Model, Run, batch, counts, prepared, shard

_SAVED, _END = 3, 7
_RUN = Run("search", (TW, RW, TW))

Wrap = Callable[[KeyedOptimizer, KeyedOptimizer], Any]


def warmup(optimizer: KeyedOptimizer, lr: float = 0.02) -> KeyedOptimizer:
    stages = [WarmupStage(WarmupPolicy.LINEAR, 5, 0.1), WarmupStage(WarmupPolicy.POLY, 20, 2.0)]
    return WarmupOptimizer(optimizer, stages, lr=lr)


def combined(fused: KeyedOptimizer, dense: KeyedOptimizer) -> CombinedOptimizer:
    return CombinedOptimizer([("fused", fused), ("dense", dense)])


WRAPPED: dict[str, Wrap] = {
    "combined": combined,
    "warm-up of all": lambda fused, dense: warmup(combined(fused, dense)),
    "warm-up of each": lambda fused, dense: combined(warmup(fused, 0.3), warmup(dense)),
    "warm-up of dense, clipped": lambda fused, dense: combined(
        fused, GradientClippingOptimizer(warmup(dense), GradientClipping.NORM, 0.01)
    ),
    "clipped, warm-up around": lambda fused, dense: warmup(
        GradientClippingOptimizer(combined(fused, dense), GradientClipping.VALUE, 0.001)
    ),
}

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.7),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.001, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2, 0.5)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 9), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}

DENSE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    **{
        name: lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01)  # type: ignore[misc]
        for name in (
            "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"
        )
    },
}  # fmt: skip
# One works on matrices only, one on sparse gradients; one wants a closure, which no sharded model can be given.
_OTHERS = {"Muon", "SparseAdam", "LBFGS"}


class Scheduled:
    """A run whose optimizer is wrapped, and its schedule."""

    def __init__(
        self,
        wrap: Wrap = combined,
        schedule: Callable[[Any], Any] | None = None,
        dense: Callable[[Any], torch.optim.Optimizer] = DENSE["Adam"],
        model: nn.Module | None = None,
    ) -> None:
        self.model = shard(prepared(_RUN) if model is None else model, _RUN)
        self.keyed = KeyedOptimizerWrapper(dict(in_backward_optimizer_filter(self.model.named_parameters())), dense)
        self.optimizer = wrap(self.model.fused_optimizer, self.keyed)
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.extra = {} if self.schedule is None else {"schedule": self.schedule}
        torch.manual_seed(77)

    def steps(self, first: int, last: int) -> list[Any]:
        """Of each step the loss and all learning rates that it is made with."""
        seen = []
        for step in range(first, last):
            features, labels = batch(step, _RUN)
            self.optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(self.model(features), labels)
            loss.backward()
            rows = [kernel.emb_module.get_learning_rate() for kernel in self.model.module.ebc.kernels()]
            seen.append((float(loss.detach()), rows, [float(group["lr"]) for group in self.keyed.param_groups]))
            self.optimizer.step()
            if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau):
                self.schedule.step(seen[-1][0])
            elif self.schedule is not None:
                self.schedule.step()
        return seen


def check_resumed(folder: Path, changing: bool, **options: Any) -> Scheduled:
    run = Scheduled(**options)
    run.steps(0, _SAVED)
    checkpoints = mpe.Checkpoints(folder)
    checkpoints.save(run.model, run.optimizer, step=_SAVED, counts=counts(_RUN), extra=run.extra)
    expected = run.steps(_SAVED, _END)
    assert not changing or len({tuple(rows) for _, rows, _ in expected}) > 1, "the schedule does nothing here"
    found = checkpoints.newest()
    assert found is not None
    resumed = Scheduled(**options, model=found.prepare_(Model(_RUN)))
    checkpoints.load(resumed.model, resumed.optimizer, found, extra=resumed.extra)
    assert resumed.steps(_SAVED, _END) == expected
    return resumed


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str, tmp_path: Path, one_rank: None) -> None:
    resumed = check_resumed(tmp_path, changing=True, schedule=SCHEDULES[schedule])
    # A checkpoint of the resumed run is as good as that of the uninterrupted one.
    states = resumed.keyed.state_dict()["state"]
    assert states.keys() == resumed.keyed.params.keys() and all("exp_avg" in state for state in states.values())


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrappers(wrapped: str, tmp_path: Path, one_rank: None) -> None:
    check_resumed(tmp_path, changing="warm-up of all" in wrapped, wrap=WRAPPED[wrapped])


@pytest.mark.parametrize("name", DENSE)
def test_dense_optimizers(name: str, tmp_path: Path, one_rank: None) -> None:
    check_resumed(tmp_path, changing=False, dense=DENSE[name])


def test_all_of_torch_and_torchrec_are_walked() -> None:
    schedulers = {c.__name__ for c in lr_scheduler.LRScheduler.__subclasses__() if c.__module__.startswith("torch.")}
    assert schedulers - {"_LRScheduler"} == SCHEDULES.keys()
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    assert {c.__name__ for c in classes} - {"Optimizer"} == DENSE.keys() | _OTHERS
    wrappers = {c for c in OptimizerWrapper.__subclasses__() if c.__module__.startswith("torchrec.")}
    assert wrappers == {WarmupOptimizer, GradientClippingOptimizer}


def test_wrappers_unlike_the_checkpoint_s_are_refused(tmp_path: Path, one_rank: None) -> None:
    run = Scheduled(WRAPPED["warm-up of all"])
    run.steps(0, 1)
    checkpoints = mpe.Checkpoints(tmp_path)
    checkpoints.save(run.model, run.optimizer, step=1, counts=counts(_RUN))
    found = checkpoints.newest()
    assert found is not None
    with pytest.raises(ValueError, match=r"none here, 0\.__warmup in the checkpoint; give an optimizer that"):
        checkpoints.load(run.model, combined(run.model.fused_optimizer, run.keyed), found)

    class Averaging(OptimizerWrapper):
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(TypeError, match="Averaging has a state that no checkpoint holds"):
        checkpoints.save(run.model, Averaging(run.keyed), step=2, counts=counts(_RUN))
