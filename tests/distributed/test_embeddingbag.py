"""Two ranks give what one process gives."""

from typing import Any

import numpy as np
import pytest

from tests.distributed.equality import (
    CASES,
    DP,
    Case,
    in_one_process,
    merged_counts,
    on_ranks,
    shard_with_counts_of_its_own,
    tables,
)
from tests.distributed.ranks import run_on_ranks


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, Any]]]:
    """Every case on two ranks, in one go: starting processes is what takes time."""
    by_rank = run_on_ranks(on_ranks, 2, CASES)
    return {case: [results[k] for results in by_rank] for k, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_equal_one_process(case: Case, results: dict[Case, list[dict[str, Any]]]) -> None:
    expected = in_one_process(case)
    ranks = results[case]
    forward = np.concatenate([rank["forward"] for rank in ranks])
    np.testing.assert_allclose(forward, expected["forward"], rtol=0, atol=3e-6)
    assert set(ranks[0]["gradients"]) == set(expected["gradients"])
    for name, gradient in expected["gradients"].items():
        scale = np.abs(gradient).max() + 1e-12
        for rank in ranks:
            error = np.abs(rank["gradients"][name] - gradient).max() / scale
            assert error < 2e-5, f"gradient of {name} is off by {error:.1e} of its largest value"
    seen = {t.name: np.zeros((t.num_embeddings, t.embedding_dim), dtype=int) for t in tables(case)}
    for rank in ranks:
        for table, row, column, values in rank["shards"]:
            part = np.s_[row : row + values.shape[0], column : column + values.shape[1]]
            np.testing.assert_allclose(values, expected["rows"][table][part], rtol=0, atol=3e-6, err_msg=table)
            seen[table][part] += 1
    copies = 2 if case.sharding == (DP,) else 1
    assert all((count == copies).all() for count in seen.values()), "shards must cover every table"


@pytest.mark.parametrize("case", [case for case in CASES if case.phase != "plain"], ids=str)
def test_gradients_are_not_trivial(case: Case, results: dict[Case, list[dict[str, Any]]]) -> None:
    gradients = results[case][0]["gradients"]
    quantizer = {name: g for name, g in gradients.items() if "mpe." in name}
    expected = {"alpha", "beta"}
    expected |= {"gamma"} if case.phase == "search" else set()
    expected |= {"zero_rows"} if case.zero_row == "learned" else set()
    assert {name.rsplit(".", 1)[1] for name in quantizer} == expected
    for name, gradient in quantizer.items():
        # After a search of no steps all widths are large: no value lies outside its range, and no row has 0 bits.
        if not (case.phase == "search, then retrain" and name.endswith(("beta", "zero_rows"))):
            assert np.abs(gradient).max() > 1e-8, name


def test_ranks_with_different_counts_are_refused() -> None:
    for message in run_on_ranks(shard_with_counts_of_its_own, 2):
        assert "different counts or plans" in message and "merge_across_ranks" in message


def test_counts_are_added_up_over_ranks() -> None:
    assert run_on_ranks(merged_counts, 2) == [[3, 5, 7]] * 2
