"""Lookups counted while a sharded model trains."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import torchrec_mpe as mpe
from tests.distributed.equality import (
    CW,
    DP,
    GRID,
    RW,
    TW,
    TWCW,
    TWRW,
    Case,
    enter,
    features_of,
    global_batch,
    local_batch,
    prepared_model,
    shard,
    tables,
)
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.frequencies import TrackedFrequencies

STEPS = 3
TWO_RANKS = [
    Case((TW,), phase="plain"),
    Case((RW,)),
    Case((CW,), phase="retrain"),
    Case((DP,)),
    Case((TW, RW, CW, DP), int32=True),
]
FOUR_RANKS = [Case((TWRW,)), Case((TWCW,), phase="plain"), Case((GRID,)), Case((TW, RW, CW, DP), weighted=True)]


def _tracked(case: Case) -> tuple[nn.Module, TrackedFrequencies]:
    model = shard(prepared_model(case), case)
    enter(model, case)
    return model, mpe.track_frequencies_(model)


def _train(model: nn.Module, case: Case) -> None:
    """Some batches of training, with one of evaluation, which must not be counted."""
    for step in range(STEPS):
        model.train()
        model(local_batch(step, case, dist.get_rank(), dist.get_world_size())[0])
        model.eval()
        model(local_batch(step, case, dist.get_rank(), dist.get_world_size())[0])


def counted(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        model, frequencies = _tracked(case)
        _train(model, case)
        merged = frequencies.merged()
        squared = {t: squares.tolist() for t, squares in merged.squared_weights.items()}
        counts = {t: merged[t].tolist() for t in merged}
        results.append({"counts": counts, "squared": squared, "bytes": frequencies.local_bytes()})
    return results


def by_hand(case: Case) -> dict[str, list[int]]:
    counts: dict[str, Counter[int]] = {t.name: Counter() for t in tables(case)}
    for step in range(STEPS):
        bags, _, _ = global_batch(step, case)
        for feature, of_feature in zip(features_of(case), bags, strict=True):
            for table in tables(case):
                if feature in table.feature_names:
                    counts[table.name].update(i for bag in of_feature for i in bag)
    return {t.name: [counts[t.name][row] for row in range(t.num_embeddings)] for t in tables(case)}


def squared_by_hand(case: Case) -> dict[str, list[float]]:
    """As a FrequencyCounter adds them up over whole batches."""
    counter = mpe.FrequencyCounter(tables(case))
    for step in range(STEPS):
        counter.update(local_batch(step, case, 0, 1)[0])
    return {table: squares.tolist() for table, squares in counter.squared_weights.items()}


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_counts_are_those_of_all_ranks(ranks: str, request: pytest.FixtureRequest) -> None:
    cases = TWO_RANKS if ranks == "two_ranks" else FOUR_RANKS
    by_rank = request.getfixturevalue(ranks).run(counted, cases)
    for k, case in enumerate(cases):
        expected = by_hand(case)
        assert sum(map(sum, expected.values())) > 0
        for results in by_rank:
            assert results[k]["counts"] == expected, case
            squared = squared_by_hand(case)
            assert results[k]["squared"].keys() == squared.keys() and bool(squared) == case.weighted
            for table, of_table in squared.items():
                assert results[k]["squared"][table] == pytest.approx(of_table), case
        # 8 bytes a row, 16 with squared weights, once over all ranks; a data-parallel table is on every one.
        copies = {t.name: len(by_rank) if case.sharding_of(t.name) == DP else 1 for t in tables(case)}
        total = sum((16 if case.weighted else 8) * t.num_embeddings * copies[t.name] for t in tables(case))
        assert sum(results[k]["bytes"] for results in by_rank) == total, case


def saved_and_loaded(first: Case, second: Case, folder: str) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Counts of one sharding in a checkpoint, loaded under another, and counted on."""
    model, frequencies = _tracked(first)
    _train(model, first)
    dcp.save({"frequencies": frequencies}, checkpoint_id=folder)
    model, frequencies = _tracked(second)
    _train(model, second)  # what was counted before is replaced
    dcp.load({"frequencies": frequencies}, checkpoint_id=folder)
    _train(model, second)
    merged = frequencies.merged()
    squared = {t: squares.tolist() for t, squares in merged.squared_weights.items()}
    return {t: merged[t].tolist() for t in merged}, squared


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Case((RW,)), Case((TW,))),
        (Case((DP,), weighted=True), Case((CW,), weighted=True)),
        (Case((TW,)), Case((DP,))),
    ],
    ids=["rw to tw", "dp to cw", "tw to dp"],
)
def test_counts_of_one_sharding_load_under_another(first: Case, second: Case, two_ranks: Ranks, tmp_path: Path) -> None:
    once = by_hand(first)
    squared_once = squared_by_hand(first)
    for counts, squared in two_ranks.run(saved_and_loaded, first, second, str(tmp_path)):
        assert counts == {table: [2 * n for n in of_table] for table, of_table in once.items()}
        assert squared.keys() == squared_once.keys()
        for table, of_table in squared_once.items():
            assert squared[table] == pytest.approx([2 * n for n in of_table])


def test_a_model_that_is_not_sharded_is_refused() -> None:
    with pytest.raises(ValueError, match="count_frequencies"):
        mpe.track_frequencies_(nn.Sequential(mpe.MPEEmbeddingBagCollection(tables(Case((TW,))))))


def test_merged_counts_make_a_plan(two_ranks: Ranks) -> None:
    for average_bits, zero in two_ranks.run(planned):
        assert 0 < average_bits < 6 and zero


def planned() -> tuple[float, bool]:
    case = Case((RW,), phase="plain")
    model, frequencies = _tracked(case)
    _train(model, case)
    counts = frequencies.merged()
    plan = mpe.precision_from_frequencies(counts, tables(case), ratio=3)
    never = counts["t1"] == 0
    return plan.average_bits, not torch.any(plan.tables["t1"].of_rows()[never]).item()
