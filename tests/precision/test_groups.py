"""Feature groups and ranks by hand."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_mpe.precision.frequency_order import counts_in_order, counts_sha256, frequency_order
from torchrec_mpe.precision.groups import equal_groups, log_rank_bounds, log_rank_groups


def test_ranks_by_hand() -> None:
    assert frequency_order(torch.tensor([9, 4, 4, 1])) is None
    ranks = frequency_order(torch.tensor([1, 9, 4]))
    assert ranks is not None and ranks.dtype == torch.int32
    assert ranks.tolist() == [2, 0, 1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_ranks_sort_the_counts_and_are_a_permutation(counts: list[int]) -> None:
    tensor = torch.tensor(counts)
    ranks = frequency_order(tensor)
    assert counts_in_order(tensor, ranks).tolist() == sorted(counts, reverse=True)
    if ranks is not None:
        assert sorted(ranks.tolist()) == list(range(len(counts)))


def test_ties_do_not_follow_the_id() -> None:
    counts = torch.ones(1000, dtype=torch.int64)
    counts[-1] = 2  # so that ids are not ranks
    ranks = frequency_order(counts)
    assert ranks is not None
    correlation = torch.corrcoef(torch.stack([ranks[:-1].double(), torch.arange(999).double()]))[0, 1]
    assert abs(float(correlation)) < 0.15
    again = frequency_order(counts)
    assert again is not None and torch.equal(ranks, again)


def test_log_rank_bounds_by_hand() -> None:
    # log(1001) / 5 = 1.3817: e^1.3817 - 1 = 2.98, e^2.763 - 1 = 14.85, e^4.145 - 1 = 62.1, e^5.527 - 1 = 250.4
    assert log_rank_bounds(1000, 5) == (0, 3, 15, 62, 250, 1000)
    assert log_rank_bounds(3, 32) == (0, 1, 2, 3)
    assert log_rank_bounds(1, 32) == (0, 1)


@given(st.integers(1, 10**9), st.integers(1, 200))
def test_log_rank_bounds_increase(rows: int, groups: int) -> None:
    bounds = log_rank_bounds(rows, groups)
    assert bounds[0] == 0 and bounds[-1] == rows and len(bounds) <= groups + 1
    assert all(a < b for a, b in pairwise(bounds))


def test_equal_groups_by_hand() -> None:
    """All rows by count: a0 9, b1 7, a1 4, b2 3, then the ones a2, a3, b0; 7 rows in 3 groups of 3."""
    groups = equal_groups({"a": torch.tensor([9, 4, 1, 1]), "b": torch.tensor([1, 7, 3])}, 3)
    assert groups.group_of_rows("a").tolist() == [0, 0, 1, 1]
    assert groups.group_of_rows("b").tolist() == [2, 0, 1]
    assert groups.rows.tolist() == [3, 3, 1]
    assert groups.frequencies.tolist() == [20, 5, 1]
    assert groups.bounds == {"a": (0, 2, 4), "b": (0, 1, 2, 3)}


def test_log_rank_groups_by_hand() -> None:
    """log(5) / 2 = 0.805: a's bound is round(1.24) = 1; b of 2 rows: log(3) / 2 = 0.549, round(0.73) = 1."""
    groups = log_rank_groups({"a": torch.tensor([2, 9, 4, 1]), "b": torch.tensor([8, 3])}, 2)
    assert groups.group_of_rows("a").tolist() == [1, 0, 1, 1]
    assert groups.group_of_rows("b").tolist() == [2, 3]
    assert groups.rows.tolist() == [1, 3, 1, 1]
    assert groups.frequencies.tolist() == [9, 7, 8, 3]
    assert groups.group_of_rows("a").dtype == torch.int16


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=40), min_size=1, max_size=4), st.integers(1, 20))
def test_groups_partition_rows_and_lookups(counts: list[list[int]], num_groups: int) -> None:
    tables = {f"t{k}": torch.tensor(c) for k, c in enumerate(counts)}
    for groups in (equal_groups(tables, num_groups), log_rank_groups(tables, num_groups)):
        every = torch.cat([groups.group_of_rows(t) for t in tables]).long()
        flat = torch.cat(list(tables.values()))
        assert torch.bincount(every, minlength=groups.num_groups).tolist() == groups.rows.tolist()
        sums = torch.zeros(groups.num_groups, dtype=torch.int64).index_add_(0, every, flat)
        assert sums.tolist() == groups.frequencies.tolist()
        assert int(groups.rows.min()) > 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        log_rank_groups({"a": torch.tensor([1])}, 0)
    with pytest.raises(ValueError, match="table a has no rows"):
        equal_groups({"a": torch.tensor([], dtype=torch.int64)}, 3)


def test_digest_tells_counts_apart() -> None:
    a, b = torch.tensor([1, 2]), torch.tensor([3])
    assert counts_sha256({"a": a, "b": b}) == counts_sha256({"b": b, "a": a})
    assert counts_sha256({"a": a, "b": b}) != counts_sha256({"a": a, "b": b + 1})
    assert counts_sha256({"a": a}) != counts_sha256({"c": a})
