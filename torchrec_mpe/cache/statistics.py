"""What a cache counts."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheStatistics:
    """Counters of one table's cache, added up over calls; names and meaning as FBGEMM's ``UVMCacheStatsIndex``.

    Attributes:
        num_calls (int): batches.
        num_requested_indices (int): lookups.
        num_unique_indices (int): distinct rows, added up over batches.
        num_unique_misses (int): of these, rows that had to be read from the store.
        num_conflict_unique_misses (int): of these, rows that found no slot in their set and went to the spill area.
        num_evictions (int): rows that made room for others. In the place of FBGEMM's ``num_conflict_misses``.
    """

    num_calls: int = 0
    num_requested_indices: int = 0
    num_unique_indices: int = 0
    num_unique_misses: int = 0
    num_conflict_unique_misses: int = 0
    num_evictions: int = 0

    @classmethod
    def of(cls, counters: Tensor) -> "CacheStatistics":
        """From ``CacheDirectory.statistics``."""
        return cls(*counters.tolist())

    @property
    def hit_rate(self) -> float:
        """Share of a batch's distinct rows that were in the cache; 0 before the first lookup."""
        return 1 - self.num_unique_misses / self.num_unique_indices if self.num_unique_indices else 0.0

    def __add__(self, other: "CacheStatistics") -> "CacheStatistics":
        return CacheStatistics(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __sub__(self, other: "CacheStatistics") -> "CacheStatistics":
        return CacheStatistics(*(a - b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(statistics: CacheStatistics) -> tuple[int, ...]:
    return tuple(vars(statistics).values())
