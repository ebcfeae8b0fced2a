"""The curvature of a sharded model is that of the same model in one process, and measuring trains nothing."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import torchrec_mpe as mpe
from tests.distributed import cached_cases
from tests.distributed.equality import (
    CW,
    DP,
    RW,
    TW,
    Case,
    Head,
    local_batch,
    shard,
    sharding_plan,
    tables,
)
from tests.distributed.ranks import Ranks
from torchrec_mpe.inference.compress.curvature import measure_curvature

ROWS = cached_cases.INITIALIZATION
STEPS = range(3)


def head(case: Case, stock: bool) -> nn.Module:
    model = Head(case)
    if stock:
        model.ebc = EmbeddingBagCollection(tables=tables(case), is_weighted=case.weighted)
    for table in tables(case):
        ROWS.fill_(model.ebc.embedding_bags[table.name].weight.data, table.name)
    return model.train()


def squared(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return (outputs - 1) ** 2 + outputs**4


def measured(case: Case, stock: bool = False, world_size: int = 0) -> dict[str, Any]:
    """Curvature of both losses, on this group or, with a world size, of that many ranks' batches in one process."""
    model = head(case, stock)
    if world_size:
        batches = [local_batch(step, case, rank, world_size)[0] for step in STEPS for rank in range(world_size)]
    else:
        state = model.state_dict()
        plan = sharding_plan(Head(case), case)  # TorchRec's own collection is offered no row-wise sharding on CPU
        sharders = mpe.sharders({"optimizer": cached_cases.ADAGRAD})
        model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders).train()
        model.load_state_dict(state)
        batches = [local_batch(step, case, dist.get_rank(), dist.get_world_size())[0] for step in STEPS]
    before = _state(model)
    found = [measure_curvature(model, batches, loss=loss) for loss in (None, squared)]
    assert model.training and _same(before, _state(model))
    return {f"{table} {k}": each[table].numpy() for k, each in enumerate(found) for table in each}


def _state(model: nn.Module) -> dict[str, Any]:
    """Parameters, and of fused tables values and steps of this rank's shards, as they are now."""
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if isinstance(model, DistributedModelParallel):
        for number, lookup in enumerate(model.module.ebc._lookups):
            for kernel in getattr(lookup, "module", lookup)._emb_modules:
                tbe = kernel.emb_module
                state |= {f"{number} {name}": buffer.clone() for name, buffer in tbe.named_buffers()}
                state[f"{number} step"] = torch.tensor(getattr(tbe, "step", 0))
                assert tbe.training
    return state


def _same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


CASES = [
    (Case((TW, RW, CW, DP), phase="plain"), False),
    (Case((RW, CW, DP, TW), phase="plain", mean=True, int32=True), False),
    (Case((CW, TW, RW, RW), phase="plain", weighted=True), False),
    (Case((TW, RW, CW, DP), phase="plain"), True),
]


@pytest.mark.parametrize(("case", "stock"), CASES, ids=str)
def test_equals_one_process(case: Case, stock: bool, two_ranks: Ranks) -> None:
    want = measured(case, stock, world_size=2)
    for found in two_ranks.run(measured, case, stock):
        assert found.keys() == want.keys()
        for name, matrix in found.items():
            np.testing.assert_allclose(matrix, want[name], rtol=2e-5, atol=1e-9, err_msg=name)


class CachedHead(nn.Module):
    def __init__(self, case: cached_cases.Case, cached: bool) -> None:
        super().__init__()
        self.pooled = cached_cases.Model(case, cached)
        self.linear = nn.Linear(sum(cached_cases.KEYS.values()), 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=torch.Generator().manual_seed(1)))
            self.linear.bias.zero_()

    def forward(self, features: Any) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.pooled(features))
        return logits


def of_cached() -> list[dict[str, Any]]:
    """With caches and without, from equal rows."""
    case = cached_cases.Case((TW, RW, CW, TW), uncached=("t3",))
    results = []
    rows: dict[Any, torch.Tensor] = {}
    for cached in (True, False):
        model = cached_cases.shard(CachedHead(case, cached), case, cached).train()
        ebc = model.module.pooled.ebc
        if cached:
            mpe.reset_rows_(model, ROWS)
            rows = {(s.name, s.first_row, s.first_column): s.read(0, s.rows) for s in ebc.shards()}
            statistics = ebc.cache_statistics()
        else:
            for table, row, column, values in ebc.local_shards():
                values.copy_(rows[table, row, column])
        batches = [cached_cases.local_batch(step, case)[0] for step in STEPS]
        found = measure_curvature(model, batches)
        if cached:
            assert ebc.cache_statistics() == statistics
            for shard_ in ebc.shards():
                key = shard_.name, shard_.first_row, shard_.first_column
                assert torch.equal(shard_.read(0, shard_.rows), rows[key])
        results.append({table: matrix.numpy() for table, matrix in found.items()})
    return results


def test_cached_tables(two_ranks: Ranks) -> None:
    for cached, uncached in two_ranks.run(of_cached):
        for table, matrix in uncached.items():
            assert matrix.any()
            np.testing.assert_allclose(cached[table], matrix, rtol=1e-5, atol=1e-9, err_msg=table)


def trained_after(measure: bool) -> list[Any]:
    """Weights after a step of training, with a measurement in between or not."""
    case = Case((TW, RW, CW, DP), phase="plain")
    model = shard(head(case, False), case)
    mpe.reset_rows_(model, ROWS)
    batch = local_batch(0, case, dist.get_rank(), dist.get_world_size())[0]
    for _ in range(2):
        model.train()
        model.zero_grad()
        if measure:
            measure_curvature(model, [batch])
        model(batch).sum().backward()
        with torch.no_grad():
            model.module.linear.weight -= 0.1 * model.module.linear.weight.grad
    linear = model.module.linear.weight.detach().numpy()
    return [linear, *(values.detach().numpy().copy() for *_, values in model.module.ebc.local_shards())]


def test_training_goes_on_as_if_nothing_had_been(two_ranks: Ranks) -> None:
    """DistributedDataParallel's reducer and the fused optimizers among it."""
    for with_it, without in zip(two_ranks.run(trained_after, True), two_ranks.run(trained_after, False), strict=True):
        for found, want in zip(with_it, without, strict=True):
            np.testing.assert_array_equal(found, want)
