from collections.abc import Sequence

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from hypothesis import given
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.from_frequencies import caches_from_frequencies


def tables(rows: Sequence[int], dims: Sequence[int]) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=f"t{k}", num_embeddings=n, embedding_dim=d, feature_names=[f"f{k}"])
        for k, (n, d) in enumerate(zip(rows, dims, strict=True))
    ]


def test_slots_go_to_the_rows_that_are_looked_up_most() -> None:
    counts = {"t0": torch.tensor([9, 8, 7, 1, 1, 1, 1, 1, 1, 1]), "t1": torch.tensor([6, 0, 0, 0, 0, 0, 0, 0, 0, 0])}
    cache = CacheConfig(4, 0.2, CacheAlgorithm.LFU)
    found = caches_from_frequencies(counts, tables([10, 10], [8, 8]), cache)
    assert {name: config.load_factor for name, config in found.items()} == pytest.approx({"t0": 0.3, "t1": 0.1})
    assert all(config.bits == 4 and config.algorithm == CacheAlgorithm.LFU for config in found.values())


def test_a_wide_row_has_to_be_looked_up_more_often() -> None:
    counts = {"t0": torch.tensor([10, 0, 0, 0]), "t1": torch.tensor([9, 0, 0, 0])}
    found = caches_from_frequencies(counts, tables([4, 4], [32, 8]), CacheConfig(load_factor=8 / 160))
    # The budget is one row of eight columns; every table gets at least a row.
    assert [config.load_factor for config in found.values()] == [0.25, 0.25]


def test_rows_that_are_looked_up_equally_often_share_what_is_left() -> None:
    counts = {"t0": torch.ones(100, dtype=torch.int64), "t1": torch.ones(300, dtype=torch.int64)}
    found = caches_from_frequencies(counts, tables([100, 300], [8, 8]), CacheConfig(load_factor=0.1))
    assert [config.load_factor for config in found.values()] == pytest.approx([0.1, 0.1])


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=40, max_size=90), min_size=1, max_size=4),
    st.sampled_from([0.1, 0.25, 0.5, 1.0]),
)
def test_together_they_hold_the_load_factor(lookups: list[list[int]], load_factor: float) -> None:
    counts = {f"t{k}": torch.tensor(of_rows) for k, of_rows in enumerate(lookups)}
    configs = tables([len(of_rows) for of_rows in lookups], [8 * (k + 1) for k in range(len(lookups))])
    found = caches_from_frequencies(counts, configs, CacheConfig(load_factor=load_factor))
    held = sum(found[t.name].load_factor * t.num_embeddings * t.embedding_dim for t in configs)
    budget = load_factor * sum(t.num_embeddings * t.embedding_dim for t in configs)
    at_least = sum(t.embedding_dim for t in configs)  # one row each, where none was due
    assert budget - 1e-6 <= held <= budget + at_least


def test_counts_have_to_fit() -> None:
    with pytest.raises(KeyError, match="no counts for table t1; counted tables: t0"):
        caches_from_frequencies({"t0": torch.ones(4, dtype=torch.int64)}, tables([4, 4], [8, 8]), CacheConfig())
    with pytest.raises(ValueError, match="table t0 has 4 rows, its counts 5"):
        caches_from_frequencies({"t0": torch.ones(5, dtype=torch.int64)}, tables([4], [8]), CacheConfig())
