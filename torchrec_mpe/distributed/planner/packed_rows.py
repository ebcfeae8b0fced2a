"""The bit-widths or the coding of a range of a table's rows, as a table of its own."""

from dataclasses import replace
from itertools import accumulate
from typing import TypeVar, cast

import torch
from torch import Tensor

from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.table_coding import TableCoding

_Table = TypeVar("_Table", bound=TableBitWidths | TableCoding)
_CHUNK_ROWS = 1 << 24


def widths_of_rows(widths: _Table, start: int, stop: int) -> _Table:
    """The rows ``start`` to ``stop`` as a table: ids count from ``start``, ranks are those within the range.

    Args:
        widths (TableBitWidths | TableCoding): of the whole table.
        start (int): first row.
        stop (int): last row, exclusive.

    Raises:
        ValueError: if the range is empty or outside the table.
    """
    counts = rows_per_segment(widths, start, stop)
    places = None
    if widths.order is not None:
        order = widths.order[start:stop].argsort()
        places = torch.empty(stop - start, dtype=torch.int32)
        places[order] = torch.arange(stop - start, dtype=torch.int32)
    return _from_segments(widths, counts, places)


def shape_of_rows(widths: _Table, start: int, stop: int) -> _Table:
    """A table that takes exactly the bytes of :func:`widths_of_rows`, without its ranks' order, which takes a sort."""
    order = None if widths.order is None else torch.arange(stop - start, dtype=torch.int32)
    return _from_segments(widths, rows_per_segment(widths, start, stop), order)


def rows_per_segment(widths: TableBitWidths | TableCoding, start: int, stop: int) -> list[int]:
    """How many of the rows ``start`` to ``stop`` each of the k segments of the frequency order holds.

    Raises:
        ValueError: if the range is empty or outside the table.
    """
    if not 0 <= start < stop <= widths.num_embeddings:
        raise ValueError(f"rows {start} to {stop} are no part of a table of {widths.num_embeddings} rows")
    if widths.order is None:
        return torch.tensor(widths.bounds).clamp(start, stop).diff().tolist()
    inner = torch.tensor(widths.bounds[1:-1], dtype=torch.int32)
    counts = torch.zeros(len(widths.bounds) - 1, dtype=torch.int64)
    for chunk in widths.order[start:stop].split(_CHUNK_ROWS):
        segment = torch.searchsorted(inner, chunk, right=True, out_int32=True)
        counts += torch.bincount(segment, minlength=len(counts))
    return counts.tolist()


def _from_segments(widths: _Table, counts: list[int], order: Tensor | None) -> _Table:
    kept = [segment for segment, count in enumerate(counts) if count]
    bounds = (0, *accumulate(counts[segment] for segment in kept))
    if isinstance(widths, TableCoding):
        groups = tuple(widths.groups[segment] for segment in kept)
        coding = replace(widths, num_embeddings=bounds[-1], bounds=bounds, groups=groups, order=order)
        return cast(_Table, coding)
    bits = tuple(widths.bits[segment] for segment in kept)
    return cast(_Table, TableBitWidths(bounds[-1], widths.embedding_dim, bounds, bits, order))
