"""Variable batch size per feature: the same as the batch with every example's bags written out."""

from functools import partial
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.distributed.equality import (
    CW,
    DP,
    EVALUATION,
    GLOBAL_BATCH,
    RW,
    TW,
    TWCW,
    TWRW,
    Case,
    assert_equal,
    features_of,
    in_one_process,
    on_ranks,
    prepared_model,
)
from tests.distributed.ranks import Ranks

ON_TWO_RANKS = [
    Case((TW,), phase="plain"),
    Case((TW,), optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    Case((TW,), phase="retrain", mean=True),
    Case((TW,), weighted=True, kernel="fused_uvm_caching", all_on_rank=1),
    Case((RW,), phase="plain", mean=True),
    Case((RW,), weighted=True, int32=True),
    Case((RW,), phase="retrain", optimizer=EmbOptimType.EXACT_ADAGRAD),
    Case((RW,), mean=True),
    Case((CW,), phase="plain", weighted=True),
    Case((CW,)),
    Case((CW,), phase="search, then retrain", mean=True, optimizer=EmbOptimType.EXACT_ADAGRAD),
    Case((TW, RW, CW, RW)),
    Case((TW, RW, CW, RW), phase="retrain", mean_tables=("t0", "t1")),
]
ON_FOUR_RANKS = [
    Case((TWRW,), phase="plain"),
    Case((TWRW,), weighted=True, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD),
    Case((TWRW,), phase="retrain", mean=True),
    Case((TWCW,), phase="retrain"),
    Case((TWRW, TWCW, RW, TW), phase="search, then retrain", weighted=True),
]
EVERY = [(case, 2) for case in ON_TWO_RANKS] + [(case, 4) for case in ON_FOUR_RANKS]


class Bags:
    """One rank's distinct bags of every feature, and which of them each example has.

    Ranks have different numbers of bags, but not in training where rows are split over ranks: there TorchRec's backward
    gathers what NCCL takes in different sizes and gloo does not.
    """

    def __init__(self, step: int, case: Case, rank: int, world_size: int) -> None:
        g = torch.Generator().manual_seed(1000 * step + rank)
        same = step != EVALUATION and bool({RW, TWRW} & set(case.sharding))
        of_counts = torch.Generator().manual_seed(step) if same else g
        self.examples = GLOBAL_BATCH // world_size
        self.bags: dict[str, list[list[int]]] = {}
        self.weights: dict[str, list[list[float]]] = {}
        self.of_example: dict[str, list[int]] = {}
        for feature, rows in features_of(case).items():
            count = int(torch.randint(1, self.examples + 1, (), generator=of_counts))
            lengths = torch.randint(0, 4, (count,), generator=g).tolist()
            self.bags[feature] = [torch.randint(rows, (n,), generator=g).tolist() for n in lengths]
            self.weights[feature] = [(torch.rand(n, generator=g) + 0.5).tolist() for n in lengths]
            self.of_example[feature] = torch.randint(count, (self.examples,), generator=g).tolist()
        self.targets = torch.randn(self.examples, generator=g)


def variable_batch(step: int, case: Case, rank: int, world_size: int) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    rank_bags = Bags(step, case, rank, world_size)
    names = list(rank_bags.bags)
    bags = [bag for feature in names for bag in rank_bags.bags[feature]]
    weights = [w for feature in names for bag in rank_bags.weights[feature] for w in bag]
    dtype = torch.int32 if case.int32 else torch.int64
    features = KeyedJaggedTensor(
        names,
        torch.tensor([i for bag in bags for i in bag], dtype=dtype),
        torch.tensor(weights) if case.weighted else None,
        torch.tensor([len(bag) for bag in bags], dtype=dtype),
        stride_per_key_per_rank=[[len(rank_bags.bags[feature])] for feature in names],
        inverse_indices=(names, torch.tensor([rank_bags.of_example[feature] for feature in names])),
    )
    return features, rank_bags.targets


def whole_batch(
    step: int, case: Case, rank: int, world_size: int, of_ranks: int
) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """The batches of all ranks one after another, every example with bags of its own."""
    every = [Bags(step, case, r, of_ranks) for r in range(of_ranks)]
    names = list(features_of(case))
    chosen = [
        (bags.bags[feature][k], bags.weights[feature][k])
        for feature in names
        for bags in every
        for k in bags.of_example[feature]
    ]
    features = KeyedJaggedTensor.from_lengths_sync(
        names,
        torch.tensor([i for bag, _ in chosen for i in bag], dtype=torch.int64),
        torch.tensor([len(bag) for bag, _ in chosen]),
        torch.tensor([w for _, weights in chosen for w in weights]) if case.weighted else None,
    )
    return features, torch.cat([bags.targets for bags in every])


@pytest.fixture(scope="module")
def results(two_ranks: Ranks, four_ranks: Ranks) -> dict[tuple[Case, int], list[dict[str, Any]]]:
    found = {}
    for world_size, ranks, cases in ((2, two_ranks, ON_TWO_RANKS), (4, four_ranks, ON_FOUR_RANKS)):
        by_rank = ranks.run(on_ranks, cases, variable_batch)
        found |= {(case, world_size): [rank[k] for rank in by_rank] for k, case in enumerate(cases)}
    return found


@pytest.mark.supports("training: variable batch per feature", "several ranks, gloo")
@pytest.mark.parametrize(("case", "world_size"), EVERY, ids=str)
def test_equals_the_whole_batch(
    case: Case, world_size: int, results: dict[tuple[Case, int], list[dict[str, Any]]]
) -> None:
    expected = in_one_process(case, world_size=world_size, batch=partial(whole_batch, of_ranks=world_size))
    assert_equal(results[case, world_size], expected)


@pytest.mark.parametrize("phase", ["plain", "search", "retrain"])
@pytest.mark.parametrize("weighted", [False, True])
def test_unsharded(phase: str, weighted: bool) -> None:
    case = Case((TW,), phase=phase, weighted=weighted)
    model = prepared_model(case)
    variable, _ = variable_batch(0, case, 0, 1)
    whole, _ = whole_batch(0, case, 0, 1, of_ranks=1)
    torch.testing.assert_close(model(variable), model(whole), rtol=0, atol=2e-6)


def several_dense_kernels() -> str:
    """TorchRec puts their variable batches together in the wrong order."""
    case = Case((RW,), kernel="dense")
    [result] = on_ranks([case], variable_batch)
    error: str = result.get("error", "")
    return error


def test_several_dense_kernels_are_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(several_dense_kernels):
        assert "tables t0, t1, t2, t3 are sharded row_wise with several dense kernels" in message


def test_data_parallel_tables(two_ranks: Ranks) -> None:
    case = Case((DP, TW, TW, RW))
    ranks = [rank[0] for rank in two_ranks.run(on_ranks, [case], variable_batch)]
    assert_equal(ranks, in_one_process(case, batch=partial(whole_batch, of_ranks=2)))
