"""Sharded collections of cached tables: what one process gives, and what TorchRec's own TBEs give."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torchrec.distributed.types import ParameterSharding, ShardingEnv2D

import torchrec_mpe as mpe
from tests.distributed.cached_cases import (
    ADAGRAD,
    INITIALIZATION,
    LFU,
    SGD,
    WHOLE,
    Case,
    Model,
    local_batch,
    shard,
    sharded,
    shards,
    tables,
    train,
    uncached_like,
    whole,
)
from tests.distributed.equality import CW, DP, GRID, RW, TW, TWCW, TWRW
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.cached_embeddingbag import ShardedCachedEmbeddingBagCollection

STEPS = 6


def on_ranks(cases: list[Case]) -> list[dict[str, Any]]:
    """Every case trained on this group: pooled embeddings, rows, counters, and evaluation after training."""
    results = []
    for case in cases:
        model = sharded(case)
        pooled = train(model, case, 0, STEPS)
        rows = list(shards(model))
        statistics = model.module.ebc.cache_statistics(across_ranks=True)
        model.eval()
        features, _ = local_batch(STEPS, case)
        evaluated = model(features).detach().numpy()
        results.append({"pooled": pooled, "rows": rows, "statistics": statistics, "evaluated": evaluated})
    return results


INT4_LFU = mpe.CacheConfig(bits=4, load_factor=0.2, algorithm=LFU)
TABLE_WISE = [
    Case((TW,)),
    Case((TW,), optimizer=SGD, weighted=True, int32=True),
    Case((TW,), cache=INT4_LFU, optimizer=ADAGRAD),
    Case((TW,), mean=True, mixed=True),
    Case((TW,), uncached=("t1",), all_on_rank=1),
]


@pytest.mark.supports("training: cached tables, every rounding as in one process", "several ranks, gloo")
def test_table_wise_is_bit_equal_to_one_process(lone_rank: Ranks, two_ranks: Ranks) -> None:
    alone = lone_rank.run(on_ranks, [replace(case, all_on_rank=None) for case in TABLE_WISE])[0]
    together = two_ranks.run(on_ranks, TABLE_WISE)
    for k, case in enumerate(TABLE_WISE):
        want, found = alone[k], [rank[k] for rank in together]
        for step in range(STEPS):
            both = np.concatenate([rank["pooled"][step] for rank in found])
            np.testing.assert_array_equal(both, want["pooled"][step], err_msg=f"{case}, step {step}")
        both = np.concatenate([rank["evaluated"] for rank in found])
        np.testing.assert_array_equal(both, want["evaluated"], err_msg=str(case))
        rows, expected = whole([rank["rows"] for rank in found], case), whole([want["rows"]], case)
        for table in expected:
            np.testing.assert_array_equal(rows[table], expected[table], err_msg=f"{case}, {table}")
        assert found[0]["statistics"] == found[1]["statistics"] == want["statistics"]
        assert all(s.num_evictions > 0 for t, s in want["statistics"].items() if t != "t3"), "no row left a cache"
        assert not set(want["statistics"]) & set(case.uncached)


# With caches as large as the tables: TorchRec's TBEs, but for the first rounding.
WHOLE_CACHES = [
    Case((TW,), cache=WHOLE),
    Case((RW,), cache=WHOLE, optimizer=SGD),
    Case((RW,), cache=WHOLE, mean=True, int32=True),
    Case((RW,), cache=WHOLE, optimizer=ADAGRAD, weighted=True),
    Case((CW,), cache=WHOLE),
    Case((CW,), cache=WHOLE, mean=True, optimizer=ADAGRAD),
    Case((CW,), cache=WHOLE, weighted=True, optimizer=SGD),
    Case((RW, CW, TW, TW), cache=WHOLE, uncached=("t0", "t3")),
]
WHOLE_CACHES_OF_FOUR = [
    Case((TWRW,), cache=WHOLE, mean=True),
    Case((TWCW,), cache=WHOLE),
    Case((GRID,), cache=WHOLE, weighted=True),
    Case((RW, RW, RW, TW), cache=WHOLE),
    Case((GRID, TWRW, CW, TW), cache=WHOLE, optimizer=ADAGRAD, mixed=True),
]


def beside_torchrec(cases: list[Case]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every case cached and not, from the same rows."""
    results = []
    for case in cases:
        model = sharded(case)
        other = uncached_like(model, case)
        found = []
        for m in (model, other):
            pooled = train(m, case, 0, STEPS)
            found.append({"pooled": pooled, "rows": list(shards(m))})
        found[0]["statistics"] = model.module.ebc.cache_statistics()
        results.append((found[0], found[1]))
    return results


def check_bit_equal(case: Case, cached: dict[str, Any], torchrec: dict[str, Any]) -> None:
    for step, (a, b) in enumerate(zip(cached["pooled"], torchrec["pooled"], strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"{case}, step {step}")
    rows = {tuple(key): values for *key, values in cached["rows"]}
    assert len(rows) == len(torchrec["rows"])
    for *key, values in torchrec["rows"]:
        np.testing.assert_array_equal(rows[tuple(key)], values, err_msg=f"{case}, {key}")


def test_whole_caches_are_bit_equal_to_torchrec(two_ranks: Ranks) -> None:
    for rank in two_ranks.run(beside_torchrec, WHOLE_CACHES):
        for case, (cached, torchrec) in zip(WHOLE_CACHES, rank, strict=True):
            check_bit_equal(case, cached, torchrec)


def test_whole_caches_on_two_hosts(four_ranks: Ranks) -> None:
    for rank in four_ranks.run(beside_torchrec, WHOLE_CACHES_OF_FOUR):
        for case, (cached, torchrec) in zip(WHOLE_CACHES_OF_FOUR, rank, strict=True):
            check_bit_equal(case, cached, torchrec)


FEW_ROWS = Case((RW,), cache=WHOLE)  # t3 has fewer rows than there are ranks, where FBGEMM's own TBE fails on CPU


def test_ranks_without_rows(two_ranks: Ranks, four_ranks: Ranks) -> None:
    few, every = (ranks.run(on_ranks, [FEW_ROWS]) for ranks in (two_ranks, four_ranks))
    assert any(name == "t3" and len(values) == 0 for name, *_, values in every[3][0]["rows"])
    for step in range(STEPS):
        pooled = [np.concatenate([rank[0]["pooled"][step] for rank in ranks]) for ranks in (few, every)]
        np.testing.assert_allclose(pooled[0], pooled[1], rtol=0, atol=1e-5)


ONE_SET = mpe.CacheConfig(bits=8, load_factor=0.01)
SMALL_CACHES = [
    Case((RW,), cache=ONE_SET),
    Case((CW,), cache=ONE_SET, optimizer=ADAGRAD),
    Case((RW, CW, TW, RW), cache=ONE_SET, mean=True, mixed=True),
    Case((RW,), cache=mpe.CacheConfig(bits=8, load_factor=0.01, algorithm=LFU), weighted=True),
]


def test_small_caches_are_close_to_torchrec(two_ranks: Ranks) -> None:
    """Rows differ by the rounding of write-backs: little, and as often up as down."""
    ranks = two_ranks.run(beside_torchrec, SMALL_CACHES)
    for k, case in enumerate(SMALL_CACHES):
        cached = whole([rank[k][0]["rows"] for rank in ranks], case)
        torchrec = whole([rank[k][1]["rows"] for rank in ranks], case)
        for table in ("t0", "t1", "t2"):
            evictions = sum(rank[k][0]["statistics"][table].num_evictions for rank in ranks)
            difference = cached[table].astype(np.float64) - torchrec[table]
            assert evictions > 50 and np.count_nonzero(difference) > 50, f"{case}, {table}: nothing was rounded"
            # A write-back rounds by less than a step, 1/250 of a row's range at 8 bits and 1/15 at 4.
            step = (np.ptp(torchrec[table], axis=1, keepdims=True) / (15 if case.mixed else 250)).clip(1e-6)
            relative = (difference / step)[difference != 0]
            assert (relative**2).mean() < 1, f"{case}, {table}"
            # Unbiased: the mean is within 4 standard errors of 0.
            assert abs(relative.mean()) < 4 * relative.std() / len(relative) ** 0.5, f"{case}, {table}"


def in_and_out_of_training() -> None:
    """Asserts on the ranks: evaluation and lookups without gradients change nothing at all."""
    case = Case((TW, RW, CW, RW))
    model = sharded(case)
    train(model, case, 0, 3)
    ebc = model.module.ebc

    def everything() -> list[bytes]:
        tensors = [t for s in ebc.cached_shards() for t in (*s.emb_module.stores()[s.table], s.read(0, s.rows))]
        iterations = [s.emb_module.iter.clone() for s in ebc.cached_shards()]
        return [t.numpy().tobytes() for t in tensors + iterations]

    before, statistics = everything(), ebc.cache_statistics()
    model.eval()
    features, _ = local_batch(7, case)
    out = model(features)
    model.train()
    with torch.no_grad():
        same = model(features)
    assert torch.equal(out, same)
    assert everything() == before and ebc.cache_statistics() == statistics
    # A state dict writes everything back: without the caches the rows are what they were but for the rounding.
    cached = list(shards(model))
    model.state_dict()
    flushed = list(shards(model))
    for part in ebc.cached_shards():
        part.emb_module.reset_cache_states()
    for (*_, a), (*_, b), (*_, c) in zip(cached, flushed, shards(model), strict=True):
        step = np.ptp(a, axis=1, keepdims=True) / 200 + 1e-6
        assert np.array_equal(b, c) and (np.abs(a - b) <= step).all()
        assert len(a) < 32 or not np.array_equal(a, b), "nothing was cached"


def test_evaluation_changes_nothing_and_a_state_dict_flushes(two_ranks: Ranks) -> None:
    two_ranks.run(in_and_out_of_training)


def learning_rate() -> list[float]:
    case = Case((TW,), optimizer=SGD)
    model = sharded(case)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.0
    model.fused_optimizer.zero_grad()
    before = list(shards(model))
    train(model, case, 0, 2)
    moved = [float(np.abs(a[3] - b[3]).max(initial=0)) for a, b in zip(before, shards(model), strict=True)]
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.1
    model.fused_optimizer.step()
    train(model, case, 2, 3)
    assert any(np.abs(a[3] - b[3]).max(initial=0) > 1e-3 for a, b in zip(before, shards(model), strict=True))
    return moved


def test_learning_rate_of_the_fused_optimizer(two_ranks: Ranks) -> None:
    for moved in two_ranks.run(learning_rate):
        assert all(distance < 1e-2 for distance in moved)  # evicted rows are rounded and that is all


def names() -> tuple[list[str], list[str], list[str]]:
    model = sharded(Case((TW, RW, CW, TW), uncached=("t1",)))
    return (
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
        sorted(model.fused_optimizer.params),
    )


def test_no_cached_row_is_a_parameter_or_buffer(two_ranks: Ranks) -> None:
    for parameters, buffers, fused in two_ranks.run(names):
        assert parameters == ["ebc.embedding_bags.t1.weight"] and not [b for b in buffers if "t0" in b or "tbe" in b]
        assert {"ebc.embedding_bags.t1.weight", "ebc.embedding_bags.t2.weight"} <= set(fused)


def initial_rows() -> list[Any]:
    """TorchRec's own initialization: init_fn of the tables."""
    torch.manual_seed(1)
    model = shard(Model(Case((RW, CW, TW, TW))), Case((RW, CW, TW, TW)))
    return list(shards(model))


def test_initial_rows(two_ranks: Ranks) -> None:
    rows = whole(two_ranks.run(initial_rows), Case((RW,)))
    for table in tables(Case((RW,))):
        bound = table.num_embeddings**-0.5  # EmbeddingBagConfig's uniform distribution
        values = rows[table.name]
        assert np.abs(values).max() <= bound * 1.01 and (len(values) < 9 or np.abs(values).max() > bound * 0.9)
        assert len(values) < 9 or abs(values.mean()) < 4 * values.std() / values.size**0.5


def reset_rows(cases: list[Case]) -> list[Any]:
    return [list(shards(sharded(case))) for case in cases]


def test_rounding_is_by_row_of_the_whole_table(two_ranks: Ranks, four_ranks: Ranks) -> None:
    cases = [Case((TW,), mixed=True), Case((RW,), mixed=True)]
    two, four = (ranks.run(reset_rows, cases) for ranks in (two_ranks, four_ranks))
    want = whole([rank[0] for rank in two], cases[0])
    for found in (whole([rank[1] for rank in ranks], cases[1]) for ranks in (two, four)):
        for table in want:
            np.testing.assert_array_equal(found[table], want[table], err_msg=table)


def lookup_counts() -> list[bool]:
    cache = mpe.CacheConfig(bits=8, load_factor=0.2, algorithm=LFU, half_life=float("inf"))
    case = Case((TW, RW, CW, RW), cache=cache)
    model = sharded(case)
    tracked = mpe.track_frequencies_(model)
    train(model, case, 0, STEPS)
    counts, exact = model.module.ebc.lookup_counts(), tracked.merged()
    assert any(int(exact[t.name].max()) > 8 for t in tables(case))
    # A count is exact up to 32 and then rounded to one of 16 steps a doubling.
    return [bool(((counts[t.name] - exact[t.name]).abs() <= exact[t.name] * 0.1).all()) for t in tables(case)]


def test_lookup_counts_of_lfu_caches(two_ranks: Ranks) -> None:
    assert two_ranks.run(lookup_counts) == [[True] * 4] * 2


def lookup_counts_of_lru() -> str:
    try:
        sharded(Case((TW,))).module.ebc.lookup_counts()
    except ValueError as error:
        return str(error)
    return ""


def test_lru_counts_nothing(two_ranks: Ranks) -> None:
    for message in two_ranks.run(lookup_counts_of_lru):
        assert message.startswith("table t0 has an LRU cache")


def fp32_rows() -> None:
    """A checkpoint of fp32 rows, as a plain collection has them, is loaded into the stores."""
    case = Case((RW, CW, TW, RW))
    model = sharded(case)
    train(model, case, 0, 2)
    weights = {
        f"ebc.embedding_bags.{t.name}.weight": INITIALIZATION.fill_(torch.empty(t.num_embeddings, t.embedding_dim), "x")
        for t in tables(case)
    }
    model.load_state_dict(dict(weights))
    for part in model.module.ebc.cached_shards():
        rows, columns = slice(part.first_row, part.first_row + part.rows), slice(part.first_column, None)
        want = weights[f"ebc.embedding_bags.{part.name}.weight"][rows, columns][:, : part.columns]
        assert not part.rows or float((part.read(0, part.rows) - want).abs().max()) < 0.01
    train(model, case, 2, 3)


def test_fp32_rows_can_be_loaded(two_ranks: Ranks) -> None:
    two_ranks.run(fp32_rows)


def sharded_by(table: str, sharding_type: str, kernel: str, cached: tuple[str, ...]) -> None:
    """A collection sharded by a plan that a user wrote; refusals come before any group."""
    case = Case((TW,), uncached=tuple(t.name for t in tables(Case((TW,))) if t.name not in cached))
    plan = {t.name: ParameterSharding(TW, "fused", [0]) for t in tables(case)}
    plan[table] = ParameterSharding(sharding_type, kernel, [0])
    ShardedCachedEmbeddingBagCollection(Model(case).ebc, plan, env=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["dense", "customized_kernel"])
def test_data_parallel_is_refused(kernel: str) -> None:
    with pytest.raises(ValueError, match=r"table t1 has a cache and is data-parallel, .* use another sharding type"):
        sharded_by("t1", DP, kernel, cached=("t1",))


def test_a_cached_kernel_without_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="table t1 has the compute kernel customized_kernel and no CacheConfig"):
        sharded_by("t1", TW, "customized_kernel", cached=("t0",))


def test_replicas_that_average_their_tbes_are_refused() -> None:
    env = object.__new__(ShardingEnv2D)
    with pytest.raises(NotImplementedError, match=r"tables t0, .* are cached, whose replicas hold different rows"):
        ShardedCachedEmbeddingBagCollection(Model(Case((TW,))).ebc, {}, env)


def statistics_without_caches() -> dict[str, Any]:
    names = tuple(t.name for t in tables(Case((TW,))))
    statistics: dict[str, Any] = sharded(Case((TW,), uncached=names)).module.ebc.cache_statistics(across_ranks=True)
    return statistics


def test_no_caches_count_nothing(two_ranks: Ranks) -> None:
    assert two_ranks.run(statistics_without_caches) == [{}, {}]
