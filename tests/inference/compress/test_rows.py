"""Every row of a table comes from one rank, as the model has it."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection

import torchrec_mpe as mpe
from tests.distributed import cached_cases
from tests.distributed.equality import CW, DP, GRID, INITIALIZATION, RW, TW, TWRW, Case, Head, sharding_plan, tables
from tests.distributed.ranks import Ranks
from torchrec_mpe.inference.compress import rows as rows_module
from torchrec_mpe.inference.compress.rows import Collection, owned_rows


def some_ids(rows: int) -> torch.Tensor:
    return torch.tensor([i for i in (2, 0, 16, 9) if i < rows])


def read(collection: Collection) -> dict[str, Any]:
    """By table: pieces of this rank, and rows of some ids summed over ranks."""
    found = {}
    with patch.object(rows_module, "_PIECE_ELEMENTS", 40):  # several pieces a table
        for table, owned in owned_rows(collection).items():
            pieces = [(first, piece.numpy().copy()) for first, piece in owned.pieces()]
            found[table] = pieces, owned.sum(owned.rows(some_ids(owned.num_embeddings))).numpy()
    return found


def whole(by_rank: list[dict[str, Any]], table: str, rows: int, dim: int) -> np.ndarray[Any, Any]:
    """The table put together; each row must come once."""
    values, times = np.zeros((rows, dim), np.float32), np.zeros(rows)
    for rank in by_rank:
        for first, piece in rank[table][0]:
            assert 0 < piece.size <= 40 and piece.shape[1] == dim
            values[first : first + len(piece)] = piece
            times[first : first + len(piece)] += 1
    assert (times == 1).all()
    return values


def assert_whole(by_rank: list[dict[str, Any]], configs: list[Any], initial: Any) -> None:
    assert len({len(rank) for rank in by_rank}) == 1
    for t in configs:
        want = initial.fill_(torch.empty(t.num_embeddings, t.embedding_dim), t.name).numpy()
        np.testing.assert_array_equal(whole(by_rank, t.name, t.num_embeddings, t.embedding_dim), want)
        for rank in by_rank:
            np.testing.assert_array_equal(rank[t.name][1], want[some_ids(t.num_embeddings).numpy()])


def read_sharded(case: Case, stock: bool) -> dict[str, Any]:
    model: nn.Module = Head(case)
    plan = sharding_plan(model, case)
    if stock:
        model.ebc = EmbeddingBagCollection(tables=tables(case))
    for table in tables(case):
        INITIALIZATION.fill_(model.ebc.embedding_bags[table.name].weight.data, table.name)
    state = model.state_dict()
    model = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=mpe.sharders())
    model.load_state_dict(state)
    return read(model.module.ebc)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("sharding", [(TW, RW, CW, DP), (DP, CW, TW, RW), (TWRW, RW, GRID, TW)], ids=str)
def test_sharded(sharding: tuple[str, ...], stock: bool, two_ranks: Ranks) -> None:
    case = Case(sharding, phase="plain")
    assert_whole(two_ranks.run(read_sharded, case, stock), tables(case), INITIALIZATION)


def test_unsharded() -> None:
    case = Case((TW,), phase="plain")
    for cls in (EmbeddingBagCollection, mpe.MPEEmbeddingBagCollection):
        collection = cls(tables=tables(case))
        for table in tables(case):
            INITIALIZATION.fill_(collection.embedding_bags[table.name].weight.data, table.name)
        assert_whole([read(collection)], tables(case), INITIALIZATION)


def read_cached() -> tuple[dict[str, Any], list[Any]]:
    """After training, when some rows are in the caches; and what the shards say, which training goes on with."""
    case = cached_cases.Case((TW, RW, CW, TW), uncached=("t3",))
    model = cached_cases.sharded(case)
    cached_cases.train(model, case, 0, 3)
    before = [(t, r, c, v.copy()) for t, r, c, v in cached_cases.shards(model)]
    tags = [cached.emb_module.cache_statistics() for cached in model.module.ebc.cached_shards()]
    found = read(model.module.ebc)
    assert tags == [cached.emb_module.cache_statistics() for cached in model.module.ebc.cached_shards()]
    return found, before


def test_cached(two_ranks: Ranks) -> None:
    by_rank = two_ranks.run(read_cached)
    case = cached_cases.Case((TW, RW, CW, TW), uncached=("t3",))
    want = cached_cases.whole([shards for _, shards in by_rank], case)
    for t in cached_cases.tables(case):
        found = [read for read, _ in by_rank]
        np.testing.assert_array_equal(whole(found, t.name, t.num_embeddings, t.embedding_dim), want[t.name])
        for rank in found:
            np.testing.assert_array_equal(rank[t.name][1], want[t.name][some_ids(t.num_embeddings).numpy()])
