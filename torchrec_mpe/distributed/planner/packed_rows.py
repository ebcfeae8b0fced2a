"""The bit-widths of a range of a table's rows, as a table of its own."""

from dataclasses import replace
from itertools import accumulate

import torch

from torchrec_mpe.packing.bit_widths import TableBitWidths

_CHUNK_ROWS = 1 << 24


def widths_of_rows(widths: TableBitWidths, start: int, stop: int) -> TableBitWidths:
    """The rows ``start`` to ``stop`` as a table: ids count from ``start``, ranks are those within the range.

    Args:
        widths (TableBitWidths): of the whole table.
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
    return replace(_from_segments(widths, counts), order=places)


def shape_of_rows(widths: TableBitWidths, start: int, stop: int) -> TableBitWidths:
    """A table that takes exactly the bytes of :func:`widths_of_rows`, without its ranks' order, which takes a sort."""
    shape = _from_segments(widths, rows_per_segment(widths, start, stop))
    if widths.order is None:
        return shape
    return replace(shape, order=torch.arange(shape.num_embeddings, dtype=torch.int32))


def rows_per_segment(widths: TableBitWidths, start: int, stop: int) -> list[int]:
    """How many of the rows ``start`` to ``stop`` each of the k segments of the frequency order holds.

    Raises:
        ValueError: if the range is empty or outside the table.
    """
    if not 0 <= start < stop <= widths.num_embeddings:
        raise ValueError(f"rows {start} to {stop} are no part of a table of {widths.num_embeddings} rows")
    if widths.order is None:
        return torch.tensor(widths.bounds).clamp(start, stop).diff().tolist()
    inner = torch.tensor(widths.bounds[1:-1], dtype=torch.int32)
    counts = torch.zeros(len(widths.bits), dtype=torch.int64)
    for chunk in widths.order[start:stop].split(_CHUNK_ROWS):
        segment = torch.searchsorted(inner, chunk, right=True, out_int32=True)
        counts += torch.bincount(segment, minlength=len(widths.bits))
    return counts.tolist()


def _from_segments(widths: TableBitWidths, counts: list[int]) -> TableBitWidths:
    kept = [(count, bits) for count, bits in zip(counts, widths.bits, strict=True) if count]
    bounds = (0, *accumulate(count for count, _ in kept))
    return TableBitWidths(bounds[-1], widths.embedding_dim, bounds, tuple(bits for _, bits in kept))
