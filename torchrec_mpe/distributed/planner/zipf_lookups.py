"""How many distinct rows lookups touch whose ids follow Zipf's law."""

import functools
import math

import torch
from torch import Tensor

ZIPF_EXPONENT = 1.05
"""Assumed where nothing is known of a table's ids; that of this project's benchmarks (``benchmarks/lookup.py``)."""

_EXACT_RANKS = 64
_GROUPS = 256
_BISECTIONS = 50


class ZipfLookups:
    """Independent lookups of a table whose row of frequency rank r, from 1, has a probability proportional to r^-s.

    Ranks above 64 are taken in 256 groups of equal probabilities, growing geometrically.

    Args:
        rows (int): of the table.
        exponent (float): s, not 1.
    """

    def __init__(self, rows: int, exponent: float = ZIPF_EXPONENT) -> None:
        self.rows = rows
        exact = min(_EXACT_RANKS, rows)
        beyond = torch.logspace(math.log2(exact + 1), math.log2(rows + 1), _GROUPS, base=2, dtype=torch.float64)
        edges = torch.cat([torch.arange(1, exact + 1, dtype=torch.float64), beyond.round()]).unique()
        power = 1 - exponent
        weight = ((edges - 0.5) ** power).diff() / power
        weight[:exact] = edges[:exact] ** -exponent
        self._first, self._count = edges[:-1] - 1, edges.diff()
        self._miss: Tensor = torch.log1p(-weight / self._count / weight.sum())  # log of not being looked up, per lookup

    def distinct_rows(self, lookups: float, without_first: float = 0) -> float:
        """Rows that are looked up at least once, in the mean: the sum of ``1 - (1 - p) ** lookups``.

        Args:
            lookups (float): number of lookups.
            without_first (float): rows of the lowest ranks that are not counted.
        """
        if lookups <= 0:
            return 0.0
        counted = (self._count - (without_first - self._first).clamp(min=0)).clamp(min=0)
        return -float((counted * torch.expm1(lookups * self._miss)).sum())

    def lookups_for(self, distinct: float) -> float:
        """The number of lookups that touch so many distinct rows in the mean; infinite for all rows or more."""
        if distinct >= self.rows:
            return math.inf
        low, high = math.log(max(distinct, 1e-9)), math.log(1e18)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self.distinct_rows(math.exp(middle)) < distinct:
                low = middle
            else:
                high = middle
        return math.exp(low)


@functools.lru_cache(maxsize=4096)
def lookups_that_fill(rows: int, slots: int) -> float:
    """Lookups of a table of ``rows`` rows under Zipf's law whose distinct rows fill ``slots`` slots."""
    return zipf_lookups(rows).lookups_for(slots)


@functools.lru_cache(maxsize=4096)
def zipf_lookups(rows: int) -> ZipfLookups:
    """Lookups of a table of so many rows, with the exponent that is assumed."""
    return ZipfLookups(rows)
