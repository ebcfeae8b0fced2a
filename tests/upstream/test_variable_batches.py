"""Variable batches lie rank after rank, and within a rank feature after feature."""

import pytest
import torch

from torchrec_mpe.upstream.variable_batches import rank_after_rank


def test_bags_of_features() -> None:
    a = torch.tensor([[1.0, 1], [2, 2], [3, 3]])  # two bags of rank 0, one of rank 1
    b = torch.tensor([[4.0], [5]])  # none of rank 0
    assert rank_after_rank([a, b], [[2, 1], [0, 2]]).tolist() == [1, 1, 2, 2, 3, 3, 4, 5]
    assert rank_after_rank([b, a], [[1, 1], [1, 2]]).tolist() == [4, 1, 1, 5, 2, 2, 3, 3]


def test_flat_parts() -> None:
    assert rank_after_rank([torch.arange(4), torch.arange(4, 7)], [[1, 3], [2, 1]]).tolist() == [0, 4, 5, 1, 2, 3, 6]


def test_every_part_has_all_ranks() -> None:
    with pytest.raises(ValueError):
        rank_after_rank([torch.arange(4), torch.arange(2)], [[1, 3], [2]])
