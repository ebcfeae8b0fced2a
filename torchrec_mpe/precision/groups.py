"""Feature groups: rows of similar frequency that share one bit-width (MPE, arXiv 2409.20305, section 3.2)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_mpe.packing.order_segments import rows_from_segments
from torchrec_mpe.precision.frequency_order import counts_in_order, counts_sha256, frequency_order


@dataclass(frozen=True)
class FeatureGroups:
    """The feature groups of the tables of one embedding dimension.

    A table's rows in frequency order are cut at ``bounds``; segment ``k`` holds the places
    ``bounds[k] <= place < bounds[k + 1]`` and belongs to group ``groups[k]``::

        place     0  1  2  3  4  5  6  7  8  9
        bounds    0     2           6           10
        groups    [ 0 ] [    1    ] [    2    ]

    Attributes:
        bounds (Mapping[str, tuple[int, ...]]): per table, k + 1 increasing places from 0 to num_embeddings.
        groups (Mapping[str, tuple[int, ...]]): per table, the group number of each of the k segments.
        order (Mapping[str, Optional[Tensor]]): per table, int32 [num_embeddings] place of each row, None where the id
            is the place.
        rows (Tensor): int64 [num_groups], rows of each group.
        frequencies (Tensor): int64 [num_groups], lookups of each group in the training data.
        counts_sha256 (str): digest of the counts that the groups were made from.
    """

    bounds: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, tuple[int, ...]]
    order: Mapping[str, Tensor | None]
    rows: Tensor
    frequencies: Tensor
    counts_sha256: str

    @property
    def num_groups(self) -> int:
        return len(self.rows)

    def group_of_rows(self, table: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The group of the rows ``start`` to ``stop`` of a table, int16 or int32 [stop - start], indexed by row id."""
        dtype = torch.int16 if self.num_groups <= torch.iinfo(torch.int16).max else torch.int32
        return rows_from_segments(self.bounds[table], self.groups[table], self.order[table], dtype, start, stop)


def log_rank_bounds(num_embeddings: int, num_groups: int) -> tuple[int, ...]:
    """Segment bounds evenly spaced in log(1 + rank): single rows at the head, thousands in the tail.

    Small tables get fewer groups, none of them empty.

    Example::

        log_rank_bounds(1000, 5)   # (0, 3, 15, 62, 250, 1000)
    """
    step = math.log1p(num_embeddings) / num_groups
    inner = (round(math.expm1(step * k)) for k in range(1, num_groups))
    return tuple(sorted({0, num_embeddings, *(b for b in inner if 0 < b < num_embeddings)}))


def log_rank_groups(counts: Mapping[str, Tensor], groups_per_table: int) -> FeatureGroups:
    """Groups of each table's own, cut at :func:`log_rank_bounds`; the default.

    Frequency does not tell which *fields* matter: groups per table let the search take bits from a useless field.

    Args:
        counts (Mapping[str, Tensor]): per table, int64 [num_embeddings].
        groups_per_table (int): groups a table, at most.
    """
    _check(counts, groups_per_table)
    bounds: dict[str, tuple[int, ...]] = {}
    groups: dict[str, tuple[int, ...]] = {}
    order: dict[str, Tensor | None] = {}
    frequencies: list[Tensor] = []
    first = 0
    for table, table_counts in counts.items():
        order[table] = frequency_order(table_counts)
        bounds[table] = log_rank_bounds(len(table_counts), groups_per_table)
        groups[table] = tuple(range(first, first + len(bounds[table]) - 1))
        first += len(groups[table])
        ordered = counts_in_order(table_counts, order[table])
        frequencies += [part.sum() for part in ordered.split(torch.tensor(bounds[table]).diff().tolist())]
    rows = torch.cat([torch.tensor(b).diff() for b in bounds.values()])
    return FeatureGroups(bounds, groups, order, rows, torch.stack(frequencies), counts_sha256(counts))


def equal_groups(counts: Mapping[str, Tensor], num_groups: int) -> FeatureGroups:
    """The paper's groups: all rows of all tables sorted by frequency, cut into groups of ceil(n / num_groups) rows.

    Source: section 3.2 and the authors' code (Leopold1423/mpe on GitHub).
    """
    _check(counts, num_groups)
    order = {table: frequency_order(c) for table, c in counts.items()}
    ordered = torch.cat([counts_in_order(c, order[table]) for table, c in counts.items()])
    size = -(-len(ordered) // num_groups)
    # A stable sort keeps each table's own order, so that a group is one segment of it in every table.
    by_count = torch.argsort(ordered, descending=True, stable=True)
    group = torch.empty(len(ordered), dtype=torch.int64)
    group[by_count] = torch.arange(len(ordered)) // size
    bounds: dict[str, tuple[int, ...]] = {}
    groups: dict[str, tuple[int, ...]] = {}
    for table, part in zip(counts, group.split([len(c) for c in counts.values()]), strict=True):
        values, lengths = torch.unique_consecutive(part, return_counts=True)
        bounds[table] = (0, *lengths.cumsum(0).tolist())
        groups[table] = tuple(values.tolist())
    used = int(group.max()) + 1
    rows = torch.bincount(group, minlength=used)
    frequencies = torch.zeros(used, dtype=torch.int64).index_add_(0, group, ordered)
    return FeatureGroups(bounds, groups, order, rows, frequencies, counts_sha256(counts))


def _check(counts: Mapping[str, Tensor], num_groups: int) -> None:
    if num_groups < 1:
        raise ValueError(f"the number of feature groups must be at least 1, got {num_groups}")
    for table, table_counts in counts.items():
        if len(table_counts) == 0:
            raise ValueError(f"table {table} has no rows")
