"""Two ranks give what one process gives."""

from typing import Any

import numpy as np
import pytest

from tests.distributed.equality import CASES, Case, in_one_process, on_ranks, tables
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
    assert all((count == 1).all() for count in seen.values()), "shards must cover every table once"


def test_search_gradients_are_not_trivial(results: dict[Case, list[dict[str, Any]]]) -> None:
    gradients = results[CASES[0]][0]["gradients"]
    quantizer = {name: g for name, g in gradients.items() if "mpe." in name}
    assert {name.rsplit(".", 1)[1] for name in quantizer} == {"alpha", "beta", "gamma", "zero_rows"}
    assert all(np.abs(g).max() > 1e-8 for g in quantizer.values())
