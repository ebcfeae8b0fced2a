"""Tables that look trained, and their rows on two ranks."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from torchrec_mpe.coding.owned_rows import TableToCode, WholeTable


def trained(
    rows: int, dim: int, seed: int = 0, name: str = "t", unseen: int = 0, shuffled: bool = False
) -> TableToCode:
    """Rows of nearly low rank that grew with their counts, Zipf counts, and an uneven curvature."""
    g = torch.Generator().manual_seed(seed)
    counts = (3 * rows / (1 + torch.arange(rows))).long().clamp(min=1)
    if unseen:
        counts[-unseen:] = 0
    directions = torch.randn(dim, dim, generator=g) * 0.6 ** torch.arange(dim).unsqueeze(1)
    weight = torch.randn(rows, dim, generator=g) @ directions * counts.float().sqrt().unsqueeze(1) * 0.01 + 0.05
    if shuffled:
        permutation = torch.randperm(rows, generator=g)
        counts, weight = counts[permutation], weight[permutation]
    factor = torch.randn(dim, dim, generator=g, dtype=torch.float64) * 0.7 ** torch.arange(dim).unsqueeze(1)
    return TableToCode(name, rows, dim, counts, factor.T @ factor / dim, WholeTable(weight.contiguous()))


def weight_of(table: TableToCode) -> Tensor:
    """All rows of a table of :func:`trained`."""
    assert isinstance(table.rows, WholeTable)
    return table.rows.weight


class Ranks:
    """Sums over threads, each of which stands for a rank."""

    def __init__(self, number: int) -> None:
        self._barrier = threading.Barrier(number, timeout=60)
        self._given: list[Tensor | None] = [None] * number

    def sum(self, rank: int, values: Tensor) -> Tensor:
        self._given[rank] = values.clone()
        self._barrier.wait()
        total = torch.stack([v for v in self._given if v is not None]).sum(0)
        self._barrier.wait()
        return total


class RowsOfRank:
    """Every second piece of a few rows of a table."""

    def __init__(self, ranks: Ranks, rank: int, weight: Tensor, piece: int = 37) -> None:
        self._ranks, self._rank, self._weight, self._piece = ranks, rank, weight, piece

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(self._rank * self._piece, len(self._weight), 2 * self._piece):
            yield first, self._weight[first : first + self._piece]

    def rows(self, ids: Tensor) -> Tensor:
        mine = ids // self._piece % 2 == self._rank
        return torch.where(mine.unsqueeze(1), self._weight[ids], 0.0)

    def sum(self, values: Tensor) -> Tensor:
        return self._ranks.sum(self._rank, values)
