"""Search, retraining and emission on cached tables: what they give without caches."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter

import torchrec_mpe as mpe
from tests.distributed.cached_cases import (
    ADAGRAD,
    INITIALIZATION,
    LFU,
    SGD,
    WHOLE,
    Case,
    Model,
    copy_rows,
    counts,
    local_batch,
    shard,
    shards,
)
from tests.distributed.equality import CW, RW, TW
from tests.distributed.ranks import Ranks
from tests.distributed.test_cached_pipelines import variable_batch
from torchrec_mpe.distributed import quantized_forward
from torchrec_mpe.modules.embedding_bag_collection import Phase
from torchrec_mpe.precision.from_frequencies import cut_precision

STEPS = 3
CONFIG = mpe.SearchConfig(num_groups=4, temperature=0.5, initialization=INITIALIZATION)


def searching(case: Case, cached: bool) -> DistributedModelParallel:
    model = Model(case, cached)
    mpe.prepare_search_(model, counts(case), CONFIG)
    return shard(model, case, cached)


def train(model: DistributedModelParallel, case: Case, first: int) -> list[np.ndarray[Any, Any]]:
    """Pooled embeddings and gradients of the replicated parameters of each step."""
    dense = list(in_backward_optimizer_filter(model.named_parameters()))
    optimizer = torch.optim.SGD([p for _, p in dense], lr=0.02)
    found = []
    for step in range(first, first + STEPS):
        features, targets = local_batch(step, case)
        pooled = model(features)
        optimizer.zero_grad()
        loss = (10 * (pooled - targets) ** 2).sum(1).mean()
        if model.module.ebc.phase is Phase.SEARCH:
            loss = loss + mpe.bit_penalty(model)
        loss.backward()
        optimizer.step()
        found += [pooled.detach().numpy(), *(p.grad.numpy().copy() for _, p in dense if p.grad is not None)]
    assert len(found) > 3 * STEPS
    return found


def packed(model: DistributedModelParallel) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: buffer.view(torch.uint8).numpy() for name, buffer in mpe.emit_inference_model(model).ebc.named_buffers()
    }


def phases(model: DistributedModelParallel, other: DistributedModelParallel, case: Case) -> None:
    """Asserts on the ranks that two models go the same way through all phases, from the same rows."""

    def same(a: list[np.ndarray[Any, Any]], b: list[np.ndarray[Any, Any]], what: str) -> None:
        for k, (found, want) in enumerate(zip(a, b, strict=True)):
            np.testing.assert_array_equal(found, want, err_msg=f"{case}, {what}, {k}")

    def evaluated() -> list[np.ndarray[Any, Any]]:
        features, _ = local_batch(20, case)
        with torch.no_grad():
            out = [m.eval()(features).numpy() for m in (model, other)]
        for m in (model, other):
            m.train()
        return out

    copy_rows(model, other)
    same(train(model, case, 0), train(other, case, 0), "search")
    same(*([out] for out in evaluated()), "evaluation")
    assert mpe.sample_precision(model).tables == mpe.sample_precision(other).tables
    plan = cut_precision(counts(case), model.module.ebc.embedding_bag_configs(), 4, 0.3, initialization=INITIALIZATION)
    for m in (model, other):
        mpe.prepare_retrain_(m, plan)
    initial = {tuple(key): values for *key, values in shards(other)}
    for *key, values in shards(model):
        # Back at the initial rows, up to their rounding to the store.
        assert np.abs(values - initial[tuple(key)]).max(initial=0) < (0.05 if case.mixed else 0.01)
    copy_rows(model, other)
    same(train(model, case, STEPS), train(other, case, STEPS), "retraining")
    a, b = packed(model), packed(other)
    assert a.keys() == b.keys()
    same(list(a.values()), list(b.values()), "packed")


CASES = [
    Case((TW,), cache=WHOLE),
    Case((RW,), cache=WHOLE, optimizer=ADAGRAD, weighted=True),
    Case((CW, RW, TW, TW), cache=WHOLE, mean=True, int32=True),
    Case((RW, TW, CW, TW), cache=WHOLE, optimizer=SGD, uncached=("t1",), mixed=True),
]


def run_phases(cases: list[Case]) -> None:
    for case in cases:
        phases(searching(case, True), searching(case, False), case)


@pytest.mark.supports("training: search and retraining on cached tables", "several ranks, gloo")
def test_phases_on_whole_caches_equal_those_without(two_ranks: Ranks) -> None:
    two_ranks.run(run_phases, CASES)


def other_lookups() -> None:
    """Asserts on the ranks: variable batches, and rows looked up unpooled by FBGEMM, as on a GPU."""
    case = Case((TW, RW, CW, TW), cache=WHOLE)
    model, other = searching(case, True), searching(case, False)
    copy_rows(model, other)
    for step in range(2):
        pooled = [m(variable_batch(step)) for m in (model, other)]
        assert torch.equal(*pooled)
        for out in pooled:
            (out**2).sum(1).mean().backward()
    with mock.patch.object(quantized_forward, "one_table_lookup", lambda tbe: None):
        unpooled = searching(case, True)
    again = searching(case, True)
    for a, b in zip(train(unpooled, case, 0), train(again, case, 0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(shards(unpooled), shards(again), strict=True):
        np.testing.assert_allclose(a[3], b[3], rtol=0, atol=1e-5)


def test_other_ways_to_look_up(two_ranks: Ranks) -> None:
    two_ranks.run(other_lookups)


def small_caches(case: Case) -> int:
    """All phases with rows that leave the caches; emission checks itself against the retrained model."""
    model = searching(case, True)
    train(model, case, 0)
    mpe.prepare_retrain_(model, mpe.sample_precision(model))
    train(model, case, STEPS)
    mpe.reset_rows_(model)
    train(model, case, 0)
    before = list(shards(model))
    emitted = mpe.emit_inference_model(model)
    after = list(shards(model))
    assert all(np.array_equal(a, b) for (*_, a), (*_, b) in zip(before, after, strict=True))
    features, _ = local_batch(9, case)
    with torch.no_grad():
        pooled, trained = emitted(features), model.eval()(features)
    torch.testing.assert_close(pooled, trained, rtol=0, atol=1e-4)
    return sum(s.num_evictions for s in model.module.ebc.cache_statistics(across_ranks=True).values())


def test_phases_on_small_caches(two_ranks: Ranks) -> None:
    case = Case((RW, CW, TW, TW), cache=mpe.CacheConfig(bits=8, load_factor=0.1, algorithm=LFU))
    for evictions in two_ranks.run(small_caches, case):
        assert evictions > 50
