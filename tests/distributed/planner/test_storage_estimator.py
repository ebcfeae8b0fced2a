"""The storage estimate against the memory of real sharded training steps."""

from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from tests.distributed.planner.cached_models import held_and_estimated
from tests.distributed.planner.measured_memory import CASES, CW, ROWS, RW, TW, Case, measure, nbytes
from tests.distributed.ranks import Ranks
from torchrec_mpe.distributed.planner.lookups import distinct_rows
from torchrec_mpe.distributed.planner.optimizer_state import state_bytes_per_row

EXACT = ("rows", "store", "cache", "spill", "optimizer_state", "directory", "row_map", "frequency_order")


@pytest.fixture(scope="module")
def measured(two_ranks: Ranks) -> dict[Case, list[dict[str, Any]]]:
    """Every case on two ranks, in one go."""
    by_rank = two_ranks.run(measure, CASES)
    return {case: [results[k] for results in by_rank] for k, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_stays_is_exact(case: Case, measured: dict[Case, list[dict[str, Any]]]) -> None:
    for rank in measured[case]:
        assert {kind: rank["estimate"][kind] for kind in EXACT} == {kind: rank[kind] for kind in EXACT}
        assert rank["store" if case.cached else "rows"] > 0
        assert (rank["row_map"] > 0) == (case.phase != "plain")
    # Two of the tables have ids in frequency order: the others' is held once over all ranks.
    held = sum(rank["frequency_order"] for rank in measured[case])
    assert held == (0 if case.phase == "plain" else 2 * ROWS * 4)


@pytest.mark.parametrize("kind", [TW, RW, CW])
def test_what_cached_tables_of_all_kinds_hold_is_exact(kind: str, two_ranks: Ranks) -> None:
    """One of the ranks has none of the only row of a table that is row-wise."""
    for held, estimated in two_ranks.run(held_and_estimated, kind):
        assert held == estimated
        assert held["store"] > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_estimate_is_within_10_percent_of_what_a_step_takes(
    case: Case, measured: dict[Case, list[dict[str, Any]]]
) -> None:
    for rank in measured[case]:
        held = sum(rank[kind] for kind in EXACT)
        estimate = sum(rank["estimate"].values())
        assert estimate == pytest.approx(held + rank["peak"], rel=0.1)


@pytest.mark.parametrize("case", [case for case in CASES if case.phase != "plain"], ids=str)
def test_a_step_s_own_memory_is_within_10_percent(case: Case, measured: dict[Case, list[dict[str, Any]]]) -> None:
    """Unpooled rows and gradients alone, which the tables would outweigh in the sum of all."""
    for rank in measured[case]:
        estimate = sum(count for kind, count in rank["estimate"].items() if kind not in EXACT)
        assert estimate == pytest.approx(rank["peak"], rel=0.1)


def test_search_takes_much_more_than_the_plain_phase(measured: dict[Case, list[dict[str, Any]]]) -> None:
    """Else the tests above would pass with TorchRec's own estimate."""
    plain, search = measured[Case(TW, "plain")][0], measured[Case(TW, "search")][0]
    assert search["peak"] > 10 * plain["peak"]
    assert sum(search["estimate"].values()) > 1.4 * sum(plain["estimate"].values())


def test_distinct_rows_are_those_of_uniform_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    for lookups, rows in ((10, 1_000_000), (5_000, 1_000), (20_000, 30_000)):
        drawn = [len(torch.randint(rows, (lookups,), generator=generator).unique()) for _ in range(20)]
        assert distinct_rows(lookups, rows) == pytest.approx(sum(drawn) / 20, rel=0.02)
    assert distinct_rows(7, 1) == 1
    assert distinct_rows(0, 10) == 0


@pytest.mark.parametrize("name", ["EXACT_SGD", "EXACT_ADAGRAD", "EXACT_ROWWISE_ADAGRAD"])
def test_optimizer_state_is_what_a_tbe_allocates(name: str) -> None:
    optimizer = EmbOptimType[name]
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(30, 12, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=optimizer
    )
    states = [state for states in tbe.split_optimizer_states() for state in states]
    assert 30 * state_bytes_per_row(optimizer, 12, "t") == nbytes(states)


def test_unknown_optimizer_names_the_table() -> None:
    with pytest.raises(ValueError, match="table clicks: the optimizer state of shampoo"):
        state_bytes_per_row(EmbOptimType.SHAMPOO, 12, "clicks")
