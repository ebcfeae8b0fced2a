"""A cached TBE under pressure: small caches, checkpoints, counters, memory, and what it refuses."""

import copy
import gc
from collections import Counter
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    GlobalWeightDecayDefinition,
    WeightDecayMode,
)
from torch import Tensor

from torchrec_mpe.cache.cached_table_batched_embedding_bags import CachedTableBatchedEmbeddingBags
from torchrec_mpe.cache.config import CacheConfig
from torchrec_mpe.cache.statistics import CacheStatistics
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.ops.cache_tensors import StoredRow

LFU, LRU = CacheAlgorithm.LFU, CacheAlgorithm.LRU
ADAGRAD = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def make(*configs: CacheConfig, rows: int = 500, dim: int = 8, **fused: Any) -> CachedTableBatchedEmbeddingBags:
    fused = {"optimizer": ADAGRAD, "learning_rate": 0.1, **fused}
    specs = [CachedTableSpec(f"t{t}", rows, dim, config) for t, config in enumerate(configs)]
    cached = CachedTableBatchedEmbeddingBags(specs, **fused)
    torch.manual_seed(0)
    cached.init_embedding_weights_uniform(-1, 1)
    return cached


def random_batch(cached: CachedTableBatchedEmbeddingBags, seed: int, ids: int = 90) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randint(table.rows, (ids,), generator=g) for table in cached.tables]
    return torch.cat(parts), torch.arange(len(cached.tables) * 3 + 1) * (ids // 3)


def step(cached: CachedTableBatchedEmbeddingBags, seed: int) -> None:
    output = cached(*random_batch(cached, seed))
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)))


def everything(cached: CachedTableBatchedEmbeddingBags) -> list[Tensor]:
    """All that tells two flushed TBEs apart."""
    tensors = [t for table in range(len(cached.tables)) for t in cached.checkpoint_tensors(table).values()]
    return [tensor.clone() for tensor in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_million_lookups_of_one_row() -> None:
    cached = make(
        CacheConfig(8, 0.1, LFU, half_life=float("inf")), optimizer=EmbOptimType.EXACT_SGD, learning_rate=1e-4
    )
    before = cached.read_rows(0, 7, 1)
    ids = torch.full((1_000_000,), 7)
    cached(ids, torch.tensor([0, 1_000_000])).sum().backward()
    assert cached.cache_statistics()[0] == CacheStatistics(1, 1_000_000, 1, 1)
    assert cached.lookup_counts(0)[7] == 507_904  # the largest
    torch.testing.assert_close(cached.read_rows(0, 7, 1), before - 100, rtol=1e-3, atol=0)
    cached.flush()
    torch.testing.assert_close(cached.read_rows(0, 7, 1), before - 100, rtol=1e-2, atol=0)


@pytest.mark.parametrize("algorithm", [LRU, LFU])
def test_a_row_that_was_evicted_comes_back_as_it_was_written(algorithm: CacheAlgorithm) -> None:
    """32 slots for 64 rows that are wanted by turns: all values on the grid, so no rounding hides a mistake."""
    cached = make(CacheConfig(8, 0.05, algorithm), optimizer=EmbOptimType.EXACT_SGD, learning_rate=1.0)
    # A range of 251 makes the scale 1, and offsets are multiples of 4: all integers are on the grid.
    values = torch.randint(80, 170, (500, 8)).float()
    values[:, 0], values[:, 1] = 0, 251
    cached.write_rows(0, 0, values)
    gradient = torch.zeros(1, 8)
    gradient[0, 2:] = torch.arange(-3.0, 3.0)
    for turn in range(10):
        first = 32 * (turn % 2)
        cached(torch.arange(first, first + 32), torch.tensor([0, 32])).backward(gradient)
        values[first : first + 32] -= gradient
        assert torch.equal(cached.read_rows(0, 0, 500), values)
    statistics = cached.cache_statistics()[0]
    assert statistics.num_unique_misses == 320 and statistics.num_evictions == 288
    assert statistics.hit_rate == 0 and cached._slots.spill == [0]


def test_a_batch_larger_than_the_cache() -> None:
    cached = make(CacheConfig(8, 0.05), optimizer=EmbOptimType.EXACT_SGD, learning_rate=1.0)
    before = cached.read_rows(0, 0, 500)
    cached(torch.arange(400), torch.tensor([0, 400])).sum().backward()
    assert cached.cache_statistics()[0].num_conflict_unique_misses == 368
    assert cached._slots.spill == [int(368 * 1.25)]
    assert torch.equal(cached.read_rows(0, 0, 400), before[:400] - 1)
    assert cached.get_learning_rate() == 1.0
    cached.flush()
    torch.testing.assert_close(cached.read_rows(0, 0, 400), before[:400] - 1, rtol=0, atol=0.02)


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ADAGRAD, ADAGRAD])
def test_growth_keeps_the_optimizer(optimizer: EmbOptimType) -> None:
    grown, large = (make(CacheConfig(8, 0.05, spill_rows=n), optimizer=optimizer) for n in (0, 460))
    for seed in range(4):
        for cached in (grown, large):
            if seed == 2:
                cached.set_learning_rate(0.7)
            output = cached(*random_batch(cached, seed, ids=30 + 90 * seed))
            output.backward(torch.ones_like(output))
    assert grown._slots.spill[0] < large._slots.spill[0] == 460
    assert torch.equal(grown.iter, large.iter) and grown._slots.tbe.step == large._slots.tbe.step
    assert torch.equal(grown.read_rows(0, 0, 500), large.read_rows(0, 0, 500))
    for cached in (grown, large):
        cached.flush()
    assert equal(everything(grown), everything(large))


@pytest.mark.parametrize("algorithm", [LRU, LFU])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(algorithm: CacheAlgorithm, bits: Any) -> None:
    config = CacheConfig(bits, 0.1, algorithm, half_life=0.5)
    cached = make(config, config)
    for seed in range(6):
        step(cached, seed)
    cached.flush()
    saved = [{k: v.clone() for k, v in cached.checkpoint_tensors(t).items()} for t in range(2)]
    iteration = int(cached.iter)
    uninterrupted: list[Tensor] = []
    for seed in range(6, 12):
        step(cached, seed)
    rows = cached.read_rows(1, 0, 500)
    cached.flush()
    uninterrupted = everything(cached)

    resumed = make(config, config)
    step(resumed, 77)  # leaves rows in its cache, which are not the checkpoint's
    for t, tensors in enumerate(saved):
        for name, tensor in resumed.checkpoint_tensors(t).items():
            tensor.copy_(tensors[name])
    resumed.checkpoint_loaded()
    resumed.set_optimizer_step(iteration)
    assert int(resumed.iter) == iteration
    for seed in range(6, 12):
        step(resumed, seed)
    assert torch.equal(resumed.read_rows(1, 0, 500), rows)
    assert resumed.cache_statistics() == cached.cache_statistics()
    resumed.flush()
    assert equal(everything(resumed), uninterrupted)


def test_a_crash_between_eviction_and_checkpoint_loses_what_came_after_the_checkpoint_only() -> None:
    cached = make(CacheConfig(8, 0.1))
    step(cached, 0)
    cached.flush()
    saved = {name: tensor.clone() for name, tensor in cached.checkpoint_tensors(0).items()}
    at_checkpoint = cached.read_rows(0, 0, 500)
    for seed in range(1, 5):
        step(cached, seed)  # evicts, and so writes to the store
    assert cached.cache_statistics()[0].num_evictions > 0
    assert not torch.equal(cached.stores()[0].rows8, saved["rows8"])
    for name, tensor in cached.checkpoint_tensors(0).items():
        tensor.copy_(saved[name])
    cached.checkpoint_loaded()
    assert torch.equal(cached.read_rows(0, 0, 500), at_checkpoint)
    assert cached.cache_statistics()[0].num_calls == 1 and cached._in_flight.last == int(saved["progress"][0])


def test_flush_again_changes_nothing() -> None:
    cached = make(CacheConfig(8, 0.1, LFU))
    step(cached, 0)
    cached.flush()
    before = everything(cached)
    cached.flush()
    assert equal(everything(cached), before)


def test_a_copy_trains_like_the_original() -> None:
    cached = make(CacheConfig(8, 0.1, LFU), CacheConfig(8, 0.1))
    step(cached, 0)
    copied = copy.deepcopy(cached)
    for seed in (1, 2):
        step(cached, seed)
        step(copied, seed)
    assert torch.equal(cached.read_rows(0, 0, 500), copied.read_rows(0, 0, 500))
    cached.flush()
    copied.flush()
    assert equal(everything(cached), everything(copied))


def test_tables_do_not_depend_on_each_other() -> None:
    """A table's rows are rounded alike, whichever tables share its TBE."""
    config = CacheConfig(4, 0.1)
    both, alone = make(config, config), make(config)
    values = torch.rand(500, 8, generator=torch.Generator().manual_seed(1))
    alone.write_rows(0, 0, values)
    both.write_rows(0, 0, values)
    for seed in range(5):
        ids, offsets = random_batch(alone, seed)
        output = alone(ids, offsets)
        output.sum().backward()
        output = both(torch.cat([ids, ids]), torch.cat([offsets, offsets[1:] + len(ids)]))
        output.sum().backward()
        assert torch.equal(both.read_rows(0, 0, 500), alone.read_rows(0, 0, 500))
    for cached in (both, alone):
        cached.flush()
    assert torch.equal(both.stores()[0].rows4, alone.stores()[0].rows4)
    assert not torch.equal(both.stores()[1].rows4, alone.stores()[0].rows4)


def test_rows_of_two_widths() -> None:
    wide = torch.zeros(100, dtype=torch.bool)
    wide[::7] = True
    spec = CachedTableSpec("t", 100, 16, CacheConfig(4, 0.2), wide)
    cached = CachedTableBatchedEmbeddingBags([spec], optimizer=ADAGRAD)
    values = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    cached.write_rows(0, 0, values)
    error = (cached.read_rows(0, 0, 100) - values).abs().amax(1)
    assert error[wide].max() < 0.05 < error[~wide].max() < 0.8
    tensors = cached.checkpoint_tensors(0)
    states = ((1, "ue6m2"),)
    assert tensors["rows8"].shape == (int(wide.sum()), StoredRow(8, 16, states).bytes)
    assert tensors["rows4"].shape == (int((~wide).sum()), StoredRow(4, 16, states).bytes)


@pytest.mark.parametrize("half_life", [0.2, 1.0, float("inf")])
def test_counts_are_halved(half_life: float) -> None:
    cached = make(CacheConfig(8, 0.1, LFU, half_life=half_life), rows=100)
    counts: Counter[int] = Counter()
    looked_up = 0
    for seed in range(8):
        ids, offsets = random_batch(cached, seed, ids=30)
        counts.update(ids.tolist())
        cached(ids, offsets).sum().backward()
        if (looked_up + 30) // (half_life * 100) > looked_up // (half_life * 100):
            counts = Counter({row: count // 2 for row, count in counts.items()})
        looked_up += 30
        assert cached.lookup_counts(0).tolist() == [counts[row] for row in range(100)]
    cached.flush()
    assert cached.lookup_counts(0).tolist() == [counts[row] for row in range(100)]
    cached.write_rows(0, 0, torch.zeros(50, 8))
    assert cached.lookup_counts(0).tolist() == [counts[row] for row in range(100)]


def test_a_shard_rounds_and_counts_as_the_whole_table_does() -> None:
    """Random numbers are a row's and a column's, wherever they are."""
    config = CacheConfig(8, 1.0, LFU, half_life=float("inf"))
    whole = CachedTableBatchedEmbeddingBags([CachedTableSpec("t", 100, 16, config)])
    shard = CachedTableBatchedEmbeddingBags([CachedTableSpec("t", 60, 8, config, first_row=40, first_column=8)])
    values = torch.rand(100, 16, generator=torch.Generator().manual_seed(0))
    values[:, :2] = values[:, 8:10] = torch.tensor([0.0, 1.0])  # rows and their halves have the same range
    whole.write_rows(0, 0, values)
    shard.write_rows(0, 0, values[40:, 8:])
    assert torch.equal(shard.read_rows(0, 0, 60), whole.read_rows(0, 40, 60)[:, 8:])
    for seed in range(3):
        ids = torch.randint(60, (60 * 37,), generator=torch.Generator().manual_seed(seed))
        offsets = torch.tensor([0, len(ids)])
        shard(ids, offsets)
        whole(ids + 40, offsets)
    assert torch.equal(shard.lookup_counts(0), whole.lookup_counts(0)[40:])
    assert not torch.equal(shard.lookup_counts(0), torch.bincount(ids, minlength=60) * 3)


def test_lru_counts_no_rows() -> None:
    with pytest.raises(ValueError, match="table t0 has an LRU cache, which counts no rows"):
        make(CacheConfig(8, 0.1)).lookup_counts(0)


def test_rows_that_are_set_lose_their_optimizer_state() -> None:
    cached = make(CacheConfig(8, 1.0, optimizer_state_dtype="fp32"))
    ids, offsets = torch.arange(10), torch.tensor([0, 10])
    cached(ids, offsets).sum().backward()
    cached.write_rows(0, 0, torch.zeros(5, 8))
    cached(ids, offsets).sum().backward()
    state = cached._slots.states[0][0]
    rows = cached._rows.directories[0].slot_rows.tolist()
    assert [float(state[rows.index(row)]) for row in (0, 4, 5, 9)] == [1, 1, 2, 2]
    assert torch.equal(cached.read_rows(0, 0, 5), cached.read_rows(0, 0, 1).expand(5, 8))


def test_rows_out_of_range_are_refused() -> None:
    cached = make(CacheConfig(8, 0.1))
    for first, rows in ((-1, 2), (499, 2), (501, 0), (0, -1)):
        with pytest.raises(IndexError, match="table t0 has 500 rows here"):
            cached.read_rows(0, first, rows)
    with pytest.raises(IndexError, match="table t0 has 500 rows here, got 2 from 499"):
        cached.write_rows(0, 499, torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"table t0 has 8 columns, got rows \[2, 7\]"):
        cached.write_rows(0, 0, torch.zeros(2, 7))
    assert cached.read_rows(0, 500, 0).shape == (0, 8)


def reachable(module: torch.nn.Module) -> dict[int, int]:
    """Bytes of the memory of every tensor that a module keeps, by address."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [module]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict | list | tuple | set | torch.nn.Module) or type(thing).__module__.startswith(
            ("torchrec_mpe", "fbgemm_gpu")
        ):
            stack += gc.get_referents(thing)
    return found


@pytest.mark.parametrize("algorithm", [LRU, LFU])
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, ADAGRAD])
def test_bytes_of_everything(optimizer: EmbOptimType, algorithm: CacheAlgorithm) -> None:
    config = CacheConfig(4, 0.1, algorithm)
    cached = make(config, config, config, optimizer=optimizer)
    for seed in range(3):
        step(cached, seed)
    cached(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert min(cached._slots.spill) > 0
    counted = cached.bytes_by_kind()
    assert all(counted[kind] > 0 for kind in counted if kind != "optimizer_state" or cached._slots.states[0])
    of_fbgemm = sum(reachable(cached).values()) - sum(counted.values())
    assert 0 <= of_fbgemm < 1000 + 200 * 3


def test_bytes_are_what_the_formula_says() -> None:
    cached = make(CacheConfig(4, 0.1, LFU, spill_rows=10), dim=16)
    sets = cached.num_sets[0]
    slots = 32 * sets + 10
    assert cached.bytes_by_kind() == {
        "store": 500 * (8 + 2 + 1),
        "cache": 32 * sets * 64,
        "spill": 10 * 64,
        "optimizer_state": slots * 4,
        "directory": slots * (4 + 4 + 1 + 1) + 500 + 7 * 8,
    }


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"optimizer": EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD}, "ema_in_place_row_wise_adagrad changes rows"),
        ({"optimizer": EmbOptimType.NONE}, "optimizer none changes rows"),
        ({"weights_precision": SparseType.FP16}, "must be FP32"),
        (
            {
                "weight_decay_mode": WeightDecayMode.COUNTER,
                "counter_based_regularization": CounterBasedRegularizationDefinition(),
            },
            "keeps prev_iter of rows",
        ),
        (
            {
                "weight_decay_mode": WeightDecayMode.DECOUPLE_GLOBAL,
                "global_weight_decay": GlobalWeightDecayDefinition(),
            },
            "keeps prev_iter of rows",
        ),
        ({"weight_decay": 0.1}, "row-wise Adagrad's weight decay is not in FBGEMM's pooled kernel on CPU"),
    ],
)
def test_what_does_not_move_with_rows_is_refused(fused: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=f"tables t0: .*{message}"):
        make(CacheConfig(), **fused)


def test_another_dtype_or_device_is_refused() -> None:
    cached = make(CacheConfig())
    assert cached.to("cpu") is cached
    step(cached, 0)
    with pytest.raises(NotImplementedError, match="must be FP32"):
        cached.half()
    with pytest.raises(NotImplementedError, match="cannot move to another device than cpu"):
        make(CacheConfig()).to("meta")


def test_tables_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="tables t0 and t1 share a TBE but not stochastic_rounding"):
        make(CacheConfig(), CacheConfig(stochastic_rounding=False))
    with pytest.raises(ValueError, match="tables t0 and t1 share a TBE but not optimizer_state_dtype"):
        make(CacheConfig(), CacheConfig(optimizer_state_dtype="fp32"))


@pytest.mark.parametrize("feature_table_map", [[1, 0], [0], [0, 0], [0, 1, 2], []])
def test_features_that_do_not_fit_the_tables_are_refused(feature_table_map: list[int]) -> None:
    specs = [CachedTableSpec(name, 10, 4, CacheConfig()) for name in "ab"]
    with pytest.raises(ValueError, match=r"(need a feature each|must be neighbours), got tables \["):
        CachedTableBatchedEmbeddingBags(specs, feature_table_map)


def test_no_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="0 tables need a feature each"):
        CachedTableBatchedEmbeddingBags([])


def test_specs_are_checked() -> None:
    with pytest.raises(ValueError, match="table x has 0 rows here"):
        CachedTableSpec("x", 0, 4, CacheConfig())
    with pytest.raises(ValueError, match=r"table x has 3 rows, wide_rows is \[2\]"):
        CachedTableSpec("x", 3, 4, CacheConfig(), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="table x has 6 columns here: FBGEMM's TBE takes multiples of 4"):
        CachedTableSpec("x", 3, 6, CacheConfig())


@pytest.mark.parametrize("mode", [True, False])
def test_ids_that_are_no_integers_are_refused(mode: bool) -> None:
    cached = make(CacheConfig()).train(mode)
    with pytest.raises(TypeError, match=r"tables t0: ids must be int32 or int64, got torch\.float32"):
        cached(torch.tensor([1.0]), torch.tensor([0, 1]))
