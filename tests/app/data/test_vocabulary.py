import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from torchrec_mpe.app.data.hashing import stable_hash
from torchrec_mpe.app.data.vocabulary import build_vocabulary


def test_ids_are_frequency_ranks_and_rare_values_share_one() -> None:
    # b and d (1 each) and e (0, only outside training) share an id with 2 occurrences, after c, which has 2 as well.
    values = pl.Series(["a", "b", "c", "d", "e", "f"])
    vocabulary = build_vocabulary(values, np.array([5, 1, 2, 1, 0, 3]), min_count=2)
    assert vocabulary.ids.tolist() == [0, 3, 2, 3, 3, 1]
    assert vocabulary.shared_id == 3
    assert vocabulary.table.rows() == [("a", 5), ("f", 3), ("c", 2), (None, 2)]


def test_shared_id_can_be_the_most_frequent() -> None:
    vocabulary = build_vocabulary(pl.Series(["a", "b", "c", "d"]), np.array([2, 1, 1, 1]), min_count=2)
    assert vocabulary.table.rows() == [(None, 3), ("a", 2)]
    assert vocabulary.ids.tolist() == [1, 0, 0, 0]
    assert vocabulary.shared_id == 0


def test_min_count_one_leaves_only_unseen_values_to_the_shared_id() -> None:
    vocabulary = build_vocabulary(pl.Series(["a", "b", "c"]), np.array([1, 3, 0]), min_count=1)
    assert vocabulary.table.rows() == [("b", 3), ("a", 1), (None, 0)]
    assert vocabulary.ids.tolist() == [1, 0, 2]
    assert vocabulary.shared_id == 2


def test_equal_counts_are_ordered_by_hash() -> None:
    values = pl.Series([f"value{i}" for i in range(100)])
    vocabulary = build_vocabulary(values, np.full(100, 7), min_count=2)
    order = np.argsort(stable_hash(values)).tolist()
    assert vocabulary.table["value"].to_list() == [*(f"value{i}" for i in order), None]
    assert order != list(range(100))


@given(st.lists(st.integers(0, 6), min_size=1), st.integers(1, 4))
def test_order_of_codes_does_not_matter_and_counts_never_rise(counts: list[int], min_count: int) -> None:
    values = pl.Series([f"v{i}" for i in range(len(counts))])
    first = build_vocabulary(values, np.array(counts), min_count)
    order = np.random.default_rng(len(counts)).permutation(len(counts))
    second = build_vocabulary(values.gather(order), np.array(counts)[order], min_count)
    assert first.table.equals(second.table)
    assert first.ids[order].tolist() == second.ids.tolist()
    ranked = first.table["count"].to_list()
    assert ranked == sorted(ranked, reverse=True)
    assert sum(ranked) == sum(counts)
    totals = np.bincount(first.ids, weights=counts, minlength=first.size)
    assert totals.tolist() == ranked
