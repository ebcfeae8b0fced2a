"""A sample of a table's rows, by which codings are judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchrec_mpe.coding.owned_rows import TableToCode

MAX_ROWS = 2048
"""Of a group."""


@dataclass(frozen=True, eq=False)
class RowSample:
    """Some rows of a table in the frequency order, the same on every rank.

    Attributes:
        places (Tensor): int64 [n], increasing.
        rows (Tensor): float32 [n, D].
        weights (Tensor): float64 [n], the weight of the rows that each stands for.
    """

    places: Tensor
    rows: Tensor
    weights: Tensor

    def between(self, first: int, stop: int) -> "RowSample":
        """The sample of a group: at most 2048 of its rows, evenly spaced, their weights raised to its own."""
        low, high = torch.searchsorted(self.places, torch.tensor([first, stop])).tolist()
        chosen = slice(low, high)
        if high - low <= MAX_ROWS:
            return RowSample(self.places[chosen], self.rows[chosen], self.weights[chosen])
        index = low + _evenly(high - low, MAX_ROWS)
        weights = self.weights[index]
        total = self.weights[chosen].sum()
        return RowSample(self.places[index], self.rows[index], weights * (total / weights.sum().clamp(min=1e-300)))


def sample_rows(table: TableToCode, bounds: Sequence[int], order: Tensor | None) -> RowSample:
    """At most 2048 rows of each group, at evenly spaced places.

    Args:
        table (TableToCode): every rank gives the part of the sample that it owns.
        bounds (Sequence[int]): places, from 0 to the number of rows that have been looked up.
        order (Optional[Tensor]): int32 [num_embeddings], the place of each row; None when ids are it.
    """
    groups = [(low, high - low) for low, high in pairwise(bounds)]
    taken = [low + _evenly(rows, min(rows, MAX_ROWS)) for low, rows in groups]
    places = torch.cat([torch.zeros(0, dtype=torch.int64), *taken])
    ids = places if order is None else _ids_of(places, order)
    rows = table.rows.sum(table.rows.rows(ids).float().clone())
    weights = table.row_weights(ids)
    stand_for = [
        torch.full((len(t),), rows / len(t), dtype=torch.float64) for t, (_, rows) in zip(taken, groups, strict=True)
    ]
    return RowSample(places, rows, weights * torch.cat([torch.zeros(0, dtype=torch.float64), *stand_for]))


def _evenly(rows: int, number: int) -> Tensor:
    """``number`` of the places 0 to rows - 1, int64, the middles of equal parts."""
    return (2 * torch.arange(number) + 1) * rows // (2 * number)


def _ids_of(places: Tensor, order: Tensor) -> Tensor:
    """The ids of the rows at increasing places."""
    wanted = torch.zeros(len(order), dtype=torch.bool)
    wanted[places] = True
    ids = torch.nonzero(wanted[order.long()]).flatten()
    return ids[torch.argsort(order[ids])]
