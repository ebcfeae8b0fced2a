"""Rows looked up as if a TBE's tables were one, against FBGEMM's own PoolingMode.NONE."""

import copy
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor

from torchrec_mpe.distributed.one_table_lookup import OneTableLookup, can_be_one_table

ROWS = (7, 30, 12)
FEATURE_TABLES = [0, 1, 1, 2]
BAGS = 5
DIM = 8


def make(
    optimizer: EmbOptimType, dims: tuple[int, ...] = (DIM,) * 3, **more: Any
) -> SplitTableBatchedEmbeddingBagsCodegen:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in zip(ROWS, dims, strict=True)],
        feature_table_map=FEATURE_TABLES,
        optimizer=optimizer,
        learning_rate=0.1,
        eps=1e-3,
        pooling_mode=PoolingMode.NONE if len(set(dims)) == 1 else PoolingMode.SUM,
        **more,
    )
    g = torch.Generator().manual_seed(0)
    for weights in tbe.split_embedding_weights():
        weights.copy_(torch.randn(weights.shape, generator=g))
    return tbe


def batch(seed: int, ids_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, (len(FEATURE_TABLES), BAGS), generator=g)
    ids = [torch.randint(ROWS[t], (int(n),), generator=g) for t, n in zip(FEATURE_TABLES, lengths.sum(1), strict=True)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.view(-1).cumsum(0)])
    return torch.cat(ids).to(ids_dtype), offsets.to(ids_dtype)


OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_and_updates_equal_those_of_mode_none(optimizer: EmbOptimType, ids_dtype: torch.dtype) -> None:
    ours, theirs = make(optimizer), make(optimizer)
    assert can_be_one_table(ours)
    lookup = OneTableLookup(ours)
    for step in range(3):
        if step == 2:
            ours.set_learning_rate(0.5)
            theirs.set_learning_rate(0.5)
        ids, offsets = batch(step, ids_dtype)
        rows, _, index, _ = lookup(ids, offsets, BAGS)
        want = theirs(ids, offsets)
        torch.testing.assert_close(rows[index.long()], want, rtol=0, atol=2e-6)
        gradient = torch.randn(want.shape, generator=torch.Generator().manual_seed(step))
        rows[index.long()].backward(gradient)
        want.backward(gradient)
        for a, b in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        for a, b in zip(ours.split_optimizer_states(), theirs.split_optimizer_states(), strict=True):
            for state, other in zip(a, b, strict=True):
                torch.testing.assert_close(state, other, rtol=1e-5, atol=1e-7)
        assert ours.step == theirs.step
    assert int(ours.iter) == int(theirs.iter)


def test_distinct_rows_are_looked_up_once() -> None:
    lookup = OneTableLookup(make(EmbOptimType.EXACT_SGD))
    ids, offsets = batch(0)
    rows, distinct, index, row_offsets = lookup(ids, offsets, BAGS)
    bounds = offsets[::BAGS].tolist()
    for f in range(len(FEATURE_TABLES)):
        part = slice(int(row_offsets[f]), int(row_offsets[f + 1]))
        assert sorted(distinct[part].tolist()) == sorted(set(ids[bounds[f] : bounds[f + 1]].tolist()))
    assert len(rows) == len(distinct) and torch.equal(distinct[index.long()], ids)


def test_no_ids() -> None:
    tbe = make(EmbOptimType.EXACT_ROWWISE_ADAGRAD)
    before = [weights.clone() for weights in tbe.split_embedding_weights()]
    ids, offsets = torch.empty(0, dtype=torch.int64), torch.zeros(len(FEATURE_TABLES) * BAGS + 1, dtype=torch.int64)
    rows, _, index, _ = OneTableLookup(tbe)(ids, offsets, BAGS)
    assert rows.shape == (0, DIM) and len(index) == 0
    rows.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tbe.split_embedding_weights(), strict=True))


def test_ids_outside_read_row_0_of_their_table() -> None:
    tbe = make(EmbOptimType.EXACT_SGD)
    ids, offsets = torch.tensor([6, 7, -1, 30]), torch.tensor([0, 1, 2, 2, 2, 2, 3, *[3] * 9, 4, *[4] * 4])
    rows, _, index, _ = OneTableLookup(tbe)(ids, offsets, BAGS)
    tables = tbe.split_embedding_weights()
    want = [tables[0][6], tables[0][0], tables[1][0], tables[2][0]]
    assert torch.equal(rows[index.long()], torch.stack(want))


def test_deep_copies_have_weights_of_their_own() -> None:
    lookup = OneTableLookup(make(EmbOptimType.EXACT_SGD))
    twin = copy.deepcopy(lookup)
    ids, offsets = batch(0)
    before = twin(ids, offsets, BAGS)[0].detach().clone()
    lookup(ids, offsets, BAGS)[0].sum().backward()
    assert torch.equal(twin(ids, offsets, BAGS)[0], before)
    assert not torch.equal(lookup(ids, offsets, BAGS)[0], before)


def test_mixed_dimensions_are_not_one_table() -> None:
    assert not can_be_one_table(make(EmbOptimType.EXACT_SGD, (8, 16, 8)))
    assert not can_be_one_table(torch.nn.Linear(2, 2))


DECAY = {"weight_decay": 0.5}
CLIPPING = {"gradient_clipping": True, "max_gradient": 0.1}


@pytest.mark.parametrize(
    "more", [DECAY | {"weight_decay_mode": mode} for mode in (WeightDecayMode.L2, WeightDecayMode.DECOUPLE)]
)
def test_row_wise_adagrad_with_weight_decay_is_not_one_table(more: dict[str, Any]) -> None:
    assert not can_be_one_table(make(EmbOptimType.EXACT_ROWWISE_ADAGRAD, **more))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_are_clipped_by_lookup_are_not_one_table(optimizer: EmbOptimType) -> None:
    assert not can_be_one_table(make(optimizer, **CLIPPING))


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD])
def test_what_fbgemm_ignores_pooled_or_not_is_one_table(optimizer: EmbOptimType) -> None:
    ours, theirs = make(optimizer, **DECAY), make(optimizer, **DECAY)
    assert can_be_one_table(ours)
    ids, offsets = batch(0)
    rows, _, index, _ = OneTableLookup(ours)(ids, offsets, BAGS)
    rows[index.long()].sum().backward()
    theirs(ids, offsets).sum().backward()
    for a, b in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
