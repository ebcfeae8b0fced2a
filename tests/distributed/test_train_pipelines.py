"""TorchRec's train pipelines do with our collection what a plain loop does, bit for bit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDistLite
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

import torchrec_mpe as mpe
from tests.distributed.equality import CW, DP, LEARNING_RATE, RW, TW, Case, Head, enter, local_batch, prepare, shard
from tests.distributed.ranks import Ranks

STEPS = 5


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    targets: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(self.features.to(device, non_blocking), self.targets.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        self.features.record_stream(stream)
        self.targets.record_stream(stream)


class Task(nn.Module):
    """What a pipeline trains: loss and predictions of a batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.head = Head(case)
        self.penalty = case.phase == "search"

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        predictions = self.head(batch.features)
        loss = ((predictions - batch.targets) ** 2).mean()
        if self.penalty:
            loss = loss + mpe.bit_penalty(self.head)
        return loss, predictions


CASES = [
    Case((TW,), phase="plain"),
    Case((TW, RW, CW, DP), optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    Case((RW, TW, TW, CW), phase="search, then retrain", weighted=True),
    Case((TW,), phase="retrain", mean=True, all_on_rank=1),
]
PIPELINES = {
    "base": TrainPipelineBase,
    "sparse_dist": TrainPipelineSparseDist,
    "sparse_dist_lite": TrainPipelineSparseDistLite,
}


def train(case: Case, pipeline: str | None) -> dict[str, np.ndarray[Any, Any]]:
    """Losses, predictions after training, rows and quantizers of this rank."""
    model = shard(prepare(Task(case), case), case)
    enter(model, case)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dense = [p for _, p in in_backward_optimizer_filter(model.named_parameters())]
    optimizer = torch.optim.SGD(dense, lr=LEARNING_RATE)
    batches = [Batch(*local_batch(step, case, rank, world_size)) for step in range(STEPS)]
    device = torch.device("cpu")
    predictions = []
    if pipeline is None:
        for batch in batches:
            optimizer.zero_grad()
            loss, predicted = model(batch)
            loss.backward()
            optimizer.step()
            predictions.append(predicted)
    else:
        source = iter(batches)
        stages = PIPELINES[pipeline](model, optimizer, device)
        for _ in batches:
            predicted = stages.progress(source)
            predictions.append(predicted)
        with pytest.raises(StopIteration):
            stages.progress(source)
        if pipeline != "base":
            assert stages._pipelined_modules, "the collection is not pipelined"
    out = {f"predictions {k}": p.detach().numpy() for k, p in enumerate(predictions)}
    for table, row, column, values in model.module.head.ebc.local_shards():
        out[f"{table} {row} {column}"] = values.detach().numpy().copy()
    out |= {name: p.detach().numpy().copy() for name, p in model.named_parameters() if "mpe." in name}
    return out


def train_every_way(case: Case) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    return {str(pipeline): train(case, pipeline) for pipeline in (None, *PIPELINES)}


@pytest.mark.supports("training: TorchRec's train pipelines", "several ranks, gloo")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pipelines_equal_the_plain_loop(case: Case, two_ranks: Ranks) -> None:
    for ways in two_ranks.run(train_every_way, case):
        loop = ways.pop("None")
        assert not np.array_equal(loop["predictions 0"], loop[f"predictions {STEPS - 1}"])
        for pipeline, found in ways.items():
            assert found.keys() == loop.keys()
            for name, values in loop.items():
                np.testing.assert_array_equal(found[name], values, err_msg=f"{name} of {pipeline}")


def evaluate(case: Case) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    model = shard(prepare(Task(case), case), case)
    optimizer = torch.optim.SGD([p for _, p in in_backward_optimizer_filter(model.named_parameters())], lr=0.1)
    model.eval()
    batches = [Batch(*local_batch(step, case, dist.get_rank(), dist.get_world_size())) for step in range(3)]
    with torch.no_grad():
        plain = [model(batch)[1].numpy() for batch in batches]
        pipeline = EvalPipelineSparseDist(model, optimizer, torch.device("cpu"))
        source = iter(batches)
        return [(pipeline.progress(source).numpy(), want) for want in plain]


def test_evaluation_pipeline(two_ranks: Ranks) -> None:
    for batches in two_ranks.run(evaluate, Case((TW, RW, RW, TW), phase="retrain")):
        for found, want in batches:
            np.testing.assert_array_equal(found, want)
