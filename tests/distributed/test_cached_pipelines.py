"""Cached tables in TorchRec's train pipelines, and with variable batches."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.train_pipelines import PrefetchTrainPipelineContext
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_mpe as mpe
from tests.distributed.cached_cases import (
    ADAGRAD,
    INITIALIZATION,
    LFU,
    ROWS_OF_FEATURE,
    WHOLE,
    Case,
    Model,
    local_batch,
    shard,
    sharded,
    shards,
    uncached_like,
)
from tests.distributed.equality import CW, RW, TW
from tests.distributed.ranks import Ranks
from tests.distributed.test_train_pipelines import Batch

STEPS = 12


class Prefetch(PrefetchTrainPipelineSparseDist):  # type: ignore[type-arg]
    """On CPU TorchRec's own prefetches nothing, silently, and its forward then fails: there are no streams.

    This is what it does on a GPU, without streams.
    """

    def _prefetch(self, context: PrefetchTrainPipelineContext) -> None:
        context.module_input_post_prefetch.clear()
        context.module_contexts_post_prefetch.clear()
        for module in self._pipelined_modules:
            name = module.forward._name
            features = context.input_dist_tensors_requests.pop(name).wait()
            module_context = context.module_contexts.pop(name)
            module.prefetch(ctx=module_context, dist_input=features, forward_stream=None)
            context.module_input_post_prefetch[name] = features
            context.module_contexts_post_prefetch[name] = module_context


PIPELINES = {"sparse_dist": TrainPipelineSparseDist, "prefetch": Prefetch}


class Task(nn.Module):
    """What a pipeline trains: loss and pooled embeddings of a batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = Model(case)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.model(batch.features)
        return (10 * (pooled - batch.targets) ** 2).sum(1).mean(), pooled


class NoUpdate(torch.optim.Optimizer):
    """The collection has nothing but rows; a pipeline wants an optimizer."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {})

    def step(self, closure: Any = None) -> None:
        pass


def train(case: Case, pipeline: str | None) -> dict[str, Any]:
    """Pooled embeddings, rows and counters, and in which order the cached TBEs were asked for what."""
    model = shard(Task(case), case)
    mpe.reset_rows_(model, INITIALIZATION)
    ebc = model.module.model.ebc
    asked: list[str] = []
    tbe = next((part.emb_module for part in ebc.cached_shards()), None)
    if tbe is not None:
        prefetch, forward = tbe.prefetch, tbe.forward
        tbe.prefetch = lambda *a, **k: (asked.append("prefetch"), prefetch(*a, **k))[1]

        def looked_up(*arguments: Any, **named: Any) -> torch.Tensor:
            asked.append("forward")
            out: torch.Tensor = forward(*arguments, **named)
            out.register_hook(lambda _: asked.append("backward"))
            return out

        tbe.forward = looked_up
    batches = [Batch(*local_batch(step, case)) for step in range(STEPS)]
    pooled = []
    if pipeline is None:
        for batch in batches:
            loss, out = model(batch)
            loss.backward()
            pooled.append(out)
    else:
        stages = PIPELINES[pipeline](model, NoUpdate(), torch.device("cpu"))
        source = iter(batches)
        pooled = [stages.progress(source) for _ in batches]
        assert stages._pipelined_modules, "the collection is not pipelined"
    return {
        "pooled": [out.detach().numpy() for out in pooled],
        "rows": [(part.name, part.read(0, part.rows).numpy()) for part in ebc.cached_shards()],
        "statistics": ebc.cache_statistics(across_ranks=True),
        "asked": asked,
    }


def every_way(case: Case) -> dict[str, dict[str, Any]]:
    return {str(pipeline): train(case, pipeline) for pipeline in (None, *PIPELINES)}


# Sets that hold the rows of two batches: what a batch in flight locks is no victim without the lock either.
CASES = [
    Case((TW,), cache=mpe.CacheConfig(bits=8, load_factor=0.5)),
    Case((RW, CW, TW, RW), cache=mpe.CacheConfig(bits=4, load_factor=0.5), optimizer=ADAGRAD),
    Case((TW,), cache=mpe.CacheConfig(bits=8, load_factor=0.5), all_on_rank=1, weighted=True),
]


@pytest.mark.supports("training: cached tables in TorchRec's prefetching train pipeline", "several ranks, gloo")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pipelines_equal_the_plain_loop(case: Case, two_ranks: Ranks) -> None:
    for rank, ways in enumerate(two_ranks.run(every_way, case)):
        loop = ways.pop("None")
        assert any(s.num_evictions > 0 for s in loop["statistics"].values())
        for name, found in ways.items():
            assert not any(s.num_conflict_unique_misses for s in found["statistics"].values())
            for step, (a, b) in enumerate(zip(loop["pooled"], found["pooled"], strict=True)):
                np.testing.assert_array_equal(a, b, err_msg=f"{name}, rank {rank}, step {step}")
            for (table, a), (_, b) in zip(loop["rows"], found["rows"], strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{name}, rank {rank}, {table}")
            assert found["statistics"] == loop["statistics"]
        if case.all_on_rank in (None, rank):
            assert loop["asked"] == ways["sparse_dist"]["asked"] == ["forward", "backward"] * STEPS
            ahead = ["prefetch", *["forward", "prefetch", "backward"] * (STEPS - 1), "forward", "backward"]
            assert ways["prefetch"]["asked"] == ahead


SPILLING = Case((RW, CW, TW, RW), cache=mpe.CacheConfig(bits=8, load_factor=0.01, algorithm=LFU), optimizer=ADAGRAD)


def test_prefetch_with_one_set_loses_no_update(two_ranks: Ranks) -> None:
    """What the batch in flight locks goes to spill areas: rows are rounded at other times, and stay close."""
    for ways in two_ranks.run(every_way, SPILLING):
        loop, found = ways["None"], ways["prefetch"]
        assert sum(s.num_conflict_unique_misses for s in found["statistics"].values()) > 50
        for (table, a), (_, b) in zip(loop["rows"], found["rows"], strict=True):
            step = np.ptp(a, axis=1, keepdims=True) / 250 + 1e-6
            assert (((a - b) / step) ** 2).mean() < 1, table


def variable_batch(step: int) -> KeyedJaggedTensor:
    """Every feature has a number of bags of its own, which examples share; ranks have equally many."""
    g = torch.Generator().manual_seed(step)
    of_rank = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    bags, counts, of_example = [], [], []
    for rows in ROWS_OF_FEATURE.values():
        count = int(torch.randint(1, 9, (), generator=g))
        lengths = torch.randint(0, 5, (count,), generator=of_rank).tolist()
        bags += [torch.randint(rows, (n,), generator=of_rank).tolist() for n in lengths]
        counts.append([count])
        of_example.append(torch.randint(count, (8,), generator=of_rank))
    return KeyedJaggedTensor(
        list(ROWS_OF_FEATURE),
        torch.tensor([i for bag in bags for i in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags]),
        stride_per_key_per_rank=counts,
        inverse_indices=(list(ROWS_OF_FEATURE), torch.stack(of_example)),
    )


def variable_batches(cases: list[Case]) -> None:
    """Asserts on the ranks: as with TorchRec's own TBEs, in training and evaluation."""
    for case in cases:
        model = sharded(case)
        other = uncached_like(model, case)
        for step in range(3):
            pooled = [m(variable_batch(step)) for m in (model, other)]
            assert torch.equal(*pooled), f"{case}, step {step}"
            for out in pooled:
                (out**2).sum(1).mean().backward()
        rows = {tuple(key): values for *key, values in shards(model)}
        assert all(np.array_equal(rows[tuple(key)], values) for *key, values in shards(other)), str(case)
        evaluated = [m.eval()(variable_batch(4)) for m in (model, other)]
        torch.testing.assert_close(*evaluated, rtol=0, atol=1e-6, msg=str(case))


def test_variable_batches(two_ranks: Ranks) -> None:
    cases = [
        Case((TW,), cache=WHOLE),
        Case((RW,), cache=WHOLE, mean=True),
        Case((CW,), cache=WHOLE),
        Case((TW, RW, CW, RW), cache=WHOLE, uncached=("t1",)),
    ]
    two_ranks.run(variable_batches, cases)
