"""Several ranks give what one process gives, for every sharding type."""

from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

import torchrec_mpe as mpe
from tests.distributed.equality import (
    CW,
    DP,
    GRID,
    RW,
    SHARD_COLUMNS,
    TW,
    TWCW,
    TWRW,
    Case,
    Head,
    assert_equal,
    in_one_process,
    on_ranks,
    shard,
    tables,
)
from tests.distributed.ranks import Ranks

SGD, ADAGRAD, ROWWISE = EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD

# On two ranks of one host. Every pair of two settings that can go wrong together is in one case at least.
ON_TWO_RANKS = [
    Case((TW,)),
    Case((TW,), phase="retrain", optimizer=ADAGRAD),
    Case((TW,), mean=True, int32=True),
    Case((TW,), weighted=True, optimizer=ROWWISE),
    Case((TW,), phase="plain", optimizer=ROWWISE),
    Case((TW,), phase="retrain", gradient_division=False, weighted=True),
    Case((TW,), all_on_rank=1),
    Case((TW,), phase="search, then retrain", all_on_rank=0, weighted=True, optimizer=ADAGRAD),
    Case((TW,), kernel="dense", weighted=True, int32=True),
    Case((TW,), phase="retrain", kernel="fused_uvm", optimizer=ROWWISE),
    Case((TW,), kernel="fused_uvm_caching", mean=True, optimizer=ADAGRAD),
    Case((RW,)),
    Case((RW,), phase="retrain", optimizer=ROWWISE, int32=True),
    Case((RW,), mean=True, optimizer=ADAGRAD),
    Case((RW,), phase="retrain", weighted=True),
    Case((RW,), grouping="paper", zero_row="zero"),
    Case((RW,), phase="plain"),
    Case((RW,), gradient_division=False),
    Case((RW,), kernel="dense", phase="retrain", mean=True),
    Case((RW,), kernel="fused_uvm", phase="search, then retrain", weighted=True),
    Case((RW,), kernel="fused_uvm_caching", phase="retrain", optimizer=ADAGRAD, gradient_division=False),
    Case((CW,)),
    Case((CW,), phase="retrain", optimizer=ROWWISE),
    Case((CW,), mean=True, optimizer=ADAGRAD, int32=True),
    Case((CW,), phase="plain", weighted=True),
    Case((CW,), phase="search, then retrain", gradient_division=False),
    Case((CW,), kernel="dense", weighted=True),
    Case((CW,), kernel="fused_uvm", phase="retrain", mean=True),
    Case((DP,)),
    Case((DP,), phase="retrain", mean=True, int32=True),
    Case((DP,), phase="plain", weighted=True),
    Case((DP,), phase="search, then retrain", gradient_division=False),
    Case((TW, RW, RW, TW)),
    Case((TW, RW, RW, TW), phase="search, then retrain", optimizer=ROWWISE),
    Case((RW, TW, CW, DP), phase="retrain", weighted=True, optimizer=ADAGRAD),
    Case((DP, CW, RW, TW), gradient_division=False, int32=True),
    # Mean pooling by rows split over ranks beside other tables: TorchRec divides after output dist.
    Case((TW, RW, RW, TW), mean=True),
    Case((RW, TW, CW, DP), phase="retrain", mean_tables=("t0", "t2")),
    Case((RW, TW, CW, RW), phase="plain", mean_tables=("t3",)),
    Case((RW, RW, DP, RW), mean_tables=("t1", "t3"), kernel="dense"),
]
# On four ranks of two hosts.
ALL_TYPES = (TWRW, TWCW, GRID, RW, CW, DP, TW)
ON_FOUR_RANKS = [
    Case((TWRW,)),
    Case((TWRW,), phase="retrain", mean=True, optimizer=ROWWISE),
    Case((TWRW,), phase="plain", weighted=True, int32=True),
    Case((TWRW,), kernel="dense", gradient_division=False),
    Case((TWRW,), kernel="fused_uvm_caching", phase="search, then retrain", weighted=True, optimizer=ADAGRAD),
    Case((TWCW,)),
    Case((TWCW,), phase="retrain", mean=True, optimizer=ROWWISE),
    Case((TWCW,), kernel="dense", phase="plain", weighted=True),
    Case((TWCW,), kernel="fused_uvm", phase="search, then retrain", optimizer=ADAGRAD, gradient_division=False),
    Case((GRID,)),
    Case((GRID,), phase="retrain", weighted=True, optimizer=ROWWISE),
    Case((GRID,), phase="plain", optimizer=ADAGRAD),
    Case((GRID,), kernel="dense", phase="retrain", int32=True),
    Case((GRID,), kernel="fused_uvm_caching", gradient_division=False, weighted=True),
    Case((RW,) * 7),  # t6 has fewer rows than there are ranks
    Case((RW,) * 7, phase="retrain", mean=True, optimizer=ROWWISE),
    Case((CW,) * 7, phase="search, then retrain", optimizer=ADAGRAD),
    Case((TW,), all_on_rank=2, optimizer=ROWWISE),
    Case((TW,), all_on_rank=3, phase="retrain", mean=True),
    Case(ALL_TYPES),
    Case(ALL_TYPES, phase="retrain", weighted=True, optimizer=ADAGRAD),
    Case(ALL_TYPES, phase="search, then retrain", optimizer=ROWWISE, int32=True),
    Case(ALL_TYPES, phase="plain", gradient_division=False),
    Case(ALL_TYPES, kernel="dense", weighted=True),
    Case((CW, TWRW, TWCW, GRID, DP, RW, TW), phase="retrain", kernel="fused_uvm", mean_tables=("t0", "t1", "t4")),
    Case((TWRW, DP, TWRW, TW, RW, TWCW, RW), mean=True, optimizer=ADAGRAD),
]
EVERY = [(case, 2) for case in ON_TWO_RANKS] + [(case, 4) for case in ON_FOUR_RANKS]

Results = dict[tuple[Case, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(two_ranks: Ranks, four_ranks: Ranks) -> Results:
    found: Results = {}
    for world_size, ranks, cases in ((2, two_ranks, ON_TWO_RANKS), (4, four_ranks, ON_FOUR_RANKS)):
        by_rank = ranks.run(on_ranks, cases)
        found |= {(case, world_size): [rank[k] for rank in by_rank] for k, case in enumerate(cases)}
    return found


def shards_of(case: Case, table: str, rows: int, columns: int, world_size: int) -> list[tuple[int, int, int, int]]:
    """First row, first column, rows and columns of every shard, as the names of the sharding types say."""
    kind = case.sharding_of(table)
    split = {RW: world_size, TWRW: 2, GRID: 2}.get(kind, 1)
    height = -(-rows // split)
    width = SHARD_COLUMNS if kind in (CW, TWCW, GRID) else columns
    one_of_each = [
        (min(part * height, rows), column, max(0, min(height, rows - part * height)), width)
        for part in range(split)
        for column in range(0, columns, width)
    ]
    return one_of_each * (world_size if kind == DP else 1)


@pytest.mark.supports("training: every sharding type equals one process", "several ranks, gloo")
@pytest.mark.parametrize(("case", "world_size"), EVERY, ids=str)
def test_equals_one_process(case: Case, world_size: int, results: Results) -> None:
    ranks = results[case, world_size]
    assert_equal(ranks, in_one_process(case, world_size=world_size))
    seen: dict[str, list[tuple[int, int, int, int]]] = {t.name: [] for t in tables(case)}
    for rank in ranks:
        for table, row, column, values in rank["shards"]:
            seen[table].append((row, column, *values.shape))
    for t in tables(case):
        want = shards_of(case, t.name, t.num_embeddings, t.embedding_dim, world_size)
        assert sorted(seen[t.name]) == sorted(want), f"table {t.name} is not sharded {case.sharding_of(t.name)}"


@pytest.mark.parametrize(("case", "world_size"), [(c, n) for c, n in EVERY if c.phase != "plain"], ids=str)
def test_gradients_are_not_trivial(case: Case, world_size: int, results: Results) -> None:
    gradients = results[case, world_size][0]["gradients"]
    quantizer = {name: g for name, g in gradients.items() if "mpe." in name}
    expected = {"alpha", "beta"}
    expected |= {"gamma"} if case.phase == "search" else set()
    expected |= {"zero_rows"} if case.zero_row == "learned" else set()
    assert {name.rsplit(".", 1)[1] for name in quantizer} == expected
    for name, gradient in quantizer.items():
        # After a search of no steps all widths are large: no value lies outside its range, and no row has 0 bits.
        if not (case.phase == "search, then retrain" and name.endswith(("beta", "zero_rows"))):
            assert np.abs(gradient).max() > 1e-8, name


def shard_with_counts_of_its_own() -> str:
    """What sharding says if a rank forgot to merge its counts."""
    case = Case((TW,))
    model = Head(case)
    g = torch.Generator().manual_seed(torch.distributed.get_rank())
    counts = {t.name: torch.randint(0, 50, (t.num_embeddings,), generator=g) for t in tables(case)}
    mpe.prepare_search_(model, counts, mpe.SearchConfig(num_groups=5))
    try:
        shard(model, case)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_different_counts_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(shard_with_counts_of_its_own):
        assert "different counts or plans" in message and "merge_across_ranks" in message


def merged_counts() -> tuple[list[int], list[float]]:
    """Counts, and squared weights that only one rank has met."""
    rank = torch.distributed.get_rank()
    squared = {"t": torch.tensor([0.5, 0.0, 9.0])} if rank else None
    counter = mpe.FrequencyCounter.from_counts({"t": torch.tensor([1, 2, 3]) + rank}, squared)
    counter.merge_across_ranks()
    return counter["t"].tolist(), counter.squared_weights["t"].tolist()


def test_counts_are_added_up_over_ranks(two_ranks: Ranks) -> None:
    assert two_ranks.run(merged_counts) == [([3, 5, 7], [1.5, 2.0, 12.0])] * 2
