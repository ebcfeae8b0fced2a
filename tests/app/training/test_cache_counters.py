"""Counters, bytes and flush of the cached tables of a sharded model."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mpe.app.models import build_model
from torchrec_mpe.app.training.cache_counters import (
    cache_statistics,
    cached_bytes,
    cached_tbes,
    flush,
    fp32_training_bytes,
    stored_bytes,
)
from torchrec_mpe.app.training.loop import shard, train_phase
from torchrec_mpe.app.training.process_group import process_group
from torchrec_mpe.app.training.settings import RunSettings, Settings
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.statistics import CacheStatistics

CPU = torch.device("cpu")
TABLES = [
    EmbeddingBagConfig(name=f"t_{f}", num_embeddings=n, embedding_dim=8, feature_names=[f])
    for f, n in (("a", 300), ("b", 50))
]


class _Data:
    """Always the same batches of 16 examples with two ids a feature."""

    def num_batches(self, *_: Any, **__: Any) -> int:
        return 6

    def batches(self, split: str, batch_size: int, **_: Any) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(len(split))
        for _step in repeat(None, 6):
            ids = [torch.randint(n.num_embeddings, (32,), generator=generator) for n in TABLES]
            features = KeyedJaggedTensor(["a", "b"], torch.cat(ids), lengths=torch.full((32,), 2))
            labels = (torch.rand(16, generator=generator) < 0.5).float()
            yield Batch(torch.zeros(16, 0), features, labels)


@pytest.mark.parametrize("cache", [CacheConfig(4, 0.1), None])
def test_counters_bytes_and_flush(cache: CacheConfig | None) -> None:
    torch.manual_seed(0)
    with process_group(CPU):
        model = shard(build_model("dnn", TABLES, 0, device=CPU, cache=cache), 16, RunSettings())
        curve = train_phase(
            model,
            _Data(),  # type: ignore[arg-type]
            Settings(batch_size=16),
            0,
            phase="train",
        )
        if cache is None:
            assert curve.caches == [] and cached_bytes(model) == {} and stored_bytes(model) == 0
            assert list(cached_tbes(model)) == [] and cache_statistics(model) == {}
            return
        totals = cache_statistics(model)
        assert {table: counted.num_calls for table, counted in totals.items()} == {"t_a": 6, "t_b": 6}
        assert all(counted.num_requested_indices == 6 * 32 for counted in totals.values())
        assert curve.steps == [1, 2, 3, 4, 5, 6] and all(window["t_a"].num_calls == 1 for window in curve.caches)
        for table in totals:
            assert sum((window[table] for window in curve.caches), CacheStatistics()) == totals[table]
        stored = 350 * (8 * 4 // 8 + 2)
        assert stored_bytes(model) == stored and fp32_training_bytes(TABLES) == 350 * 4 * 9
        assert cached_bytes(model)["store"] == stored + 350, "a byte a row for the state of row-wise Adagrad"
        assert sum(cached_bytes(model).values()) == sum(sum(t.bytes_by_kind().values()) for t in cached_tbes(model))

        before = [tbe.read_rows(t, 0, table.rows) for tbe in cached_tbes(model) for t, table in enumerate(tbe.tables)]
        flush(model)
        after = [tbe.read_rows(t, 0, table.rows) for tbe in cached_tbes(model) for t, table in enumerate(tbe.tables)]
        for rows, flushed in zip(before, after, strict=True):
            assert not torch.equal(rows, flushed), "rows of the cache were not on the grid of 4 bits"
            assert (rows - flushed).abs().max() < 0.3 * rows.abs().max()
            assert all(len(row.unique()) <= 16 for row in flushed)
        assert cache_statistics(model) == totals
