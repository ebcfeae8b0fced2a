"""Where the frequency order is cut."""

import torch

from torchrec_mpe.coding.groups import count_bounds


def test_counts_are_cut_at_one_two_three_and_then_by_the_root_of_two() -> None:
    counts = [30] * 8 + [12] * 9 + [11] * 8 + [10] * 8 + [8] * 8 + [5] * 8 + [4] * 8 + [3] * 8 + [2] * 8 + [1] * 8
    bounds = count_bounds(torch.tensor(counts + [0] * 5))
    assert bounds == (0, 8, 25, 41, 57, 65, 73, 81)
    assert count_bounds(torch.tensor(counts).double()) == bounds


def test_groups_of_few_rows_join_the_next_and_the_last_the_one_before() -> None:
    assert count_bounds(torch.tensor([900, 500, 40, *[9] * 7, *[1] * 3])) == (0, 13)
    assert count_bounds(torch.tensor([900, 500, 40, *[9] * 7, *[1] * 8])) == (0, 10, 18)


def test_tables_without_lookups_or_of_one_row() -> None:
    assert count_bounds(torch.tensor([0, 0])) == (0,)
    assert count_bounds(torch.tensor([5])) == (0, 1)
    assert count_bounds(torch.tensor([5, 0, 0])) == (0, 1)
    assert count_bounds(torch.tensor([0.25, 1e-30, 0.0])) == (0, 2)
