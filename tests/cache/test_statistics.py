"""What a cache counts."""

import torch

from torchrec_mpe.cache.statistics import CacheStatistics


def test_sums_differences_and_the_hit_rate() -> None:
    before = CacheStatistics.of(torch.tensor([1, 10, 8, 4, 1, 2]))
    after = CacheStatistics.of(torch.tensor([2, 30, 18, 6, 2, 3]))
    assert after - before == CacheStatistics(1, 20, 10, 2, 1, 1)
    assert before + (after - before) == after
    assert (after - before).hit_rate == 0.8
    assert CacheStatistics().hit_rate == 0
