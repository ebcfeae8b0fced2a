"""Some tables, or ranges of their rows, as packed tables of their own: every stored row keeps its bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from torchrec_mpe.distributed.planner.packed_rows import widths_of_rows
from torchrec_mpe.inference.sharded.consecutive_rows import locate_consecutive
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.ops.reference.component_codes import read_codes, write_codes_
from torchrec_mpe.ops.reference.run_coding import component_bits
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.choose_directory import choose_directory, lay_out
from torchrec_mpe.packing.directory_lines import write_directory
from torchrec_mpe.packing.layout import ALIGNMENT, END_PADDING, aligned, lay_out_coded_table
from torchrec_mpe.packing.pack_coded import coding_tensors, write_coded_directory
from torchrec_mpe.packing.packed_tables import PackedTables, TableShape, int32_tensor
from torchrec_mpe.packing.read_coding import coding_of_table
from torchrec_mpe.packing.table_coding import TableCoding

_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class RowRange:
    """The rows ``first_row`` to ``first_row + num_rows`` of table ``table``, an index of the packed tables."""

    table: int
    first_row: int
    num_rows: int


def coding_of_range(packed: PackedTables, rows: RowRange) -> TableBitWidths | TableCoding:
    """The bit-widths of a range of packed rows, see :func:`widths_of_range`, or of a coded table its coding."""
    if packed.components_of(rows.table) is None:
        return widths_of_range(packed, rows)
    coding = coding_of_table(packed, rows.table)
    return coding if _is_whole(packed, rows) else widths_of_rows(coding, rows.first_row, rows.first_row + rows.num_rows)


def widths_of_range(packed: PackedTables, rows: RowRange) -> TableBitWidths:
    """The bit-widths of a range of packed rows, read from the directory; ids count from the range's first row.

    Work is per run with a RANKED directory, else per row. Ids that are not in frequency order are ordered by bit-width,
    widest first: the frequencies themselves are not stored.

    Args:
        packed (PackedTables): on the CPU.
        rows (RowRange): of one of its tables that are not coded.
    """
    shape = packed.tables[rows.table]
    if int(packed.directory_kinds[rows.table]) == Directory.RANKED:
        end = rows.first_row + rows.num_rows
        own = _runs_of(packed, rows.table)
        starts, bits = packed.run_starts[own].tolist(), (packed.run_records[own, 1] >> 32).tolist()
        stops = [*starts[1:], shape.num_embeddings]
        kept = [
            (max(low, rows.first_row) - rows.first_row, b)
            for low, high, b in zip(starts, stops, bits, strict=True)
            if low < end and high > rows.first_row
        ]
        return TableBitWidths(
            rows.num_rows, shape.embedding_dim, (*(low for low, _ in kept), rows.num_rows), tuple(b for _, b in kept)
        )
    of_rows = torch.empty(rows.num_rows, dtype=torch.uint8)
    for start, stop in _chunks(rows):
        _, widths = _locate(packed, rows.table, start, stop)
        of_rows[start - rows.first_row : stop - rows.first_row] = widths.to(torch.uint8)
    counts = torch.bincount(of_rows, minlength=MAX_BITS + 1).tolist()
    widest_first = [b for b in range(MAX_BITS, -1, -1) if counts[b]]
    places = None
    if len(widest_first) > 1:
        places = torch.empty(rows.num_rows, dtype=torch.int32)
        order = of_rows.argsort(descending=True, stable=True)
        places[order] = torch.arange(rows.num_rows, dtype=torch.int32)
    bounds = (0, *accumulate(counts[b] for b in widest_first))
    return TableBitWidths(rows.num_rows, shape.embedding_dim, bounds, tuple(widest_first), places)


def take_rows(packed: PackedTables, ranges: Sequence[RowRange]) -> PackedTables:
    """Packed tables that hold the given ranges, a table each, in their order.

    A whole table is copied as it is. A range of rows gets the directory that makes it smallest, and rows are moved, not
    unpacked; ids count from its first row. Scales, levels and 0-bit vectors that nothing uses stay behind.

    Args:
        packed (PackedTables): validated, on any device.
        ranges (Sequence[RowRange]): at least one, each of at least one row.

    Returns:
        PackedTables: on the CPU; ``packed`` itself if the ranges are all its tables in order. A range of table "t" that
        starts at row 7 is called "t/7".

    Raises:
        ValueError: naming the table, if a range is empty or not within its table.
    """
    for rows in ranges:
        table = packed.tables[rows.table]
        if rows.first_row < 0 or rows.num_rows < 1 or rows.first_row + rows.num_rows > table.num_embeddings:
            raise ValueError(
                f"table {table.name}: rows {rows.first_row} to {rows.first_row + rows.num_rows} are no part of its "
                f"{table.num_embeddings} rows"
            )
    packed = packed.cpu()
    if [r.table for r in ranges] == list(range(len(packed.tables))) and all(_is_whole(packed, r) for r in ranges):
        return packed
    parts = [_whole(packed, r.table) if _is_whole(packed, r) else _range(packed, r) for r in ranges]
    weights_offsets: list[int] = []
    end = 0
    for part in parts:
        weights_offsets.append(-(-end // part.alignment) * part.alignment)
        end = weights_offsets[-1] + part.weights.numel()
    weights = torch.zeros(aligned(end) + END_PADDING, dtype=torch.uint8)
    for part, start in zip(parts, weights_offsets, strict=True):
        weights[start : start + part.weights.numel()] = part.weights
    directory_ends = list(accumulate(part.directory.numel() for part in parts))
    return PackedTables(
        tables=tuple(part.shape for part in parts),
        weights=weights,
        weights_offsets=torch.tensor(weights_offsets, dtype=torch.int64),
        rows_per_table=int32_tensor([part.shape.num_embeddings for part in parts]),
        run_records=torch.cat([part.run_records for part in parts]),
        run_starts=torch.cat([part.run_starts for part in parts]),
        run_offsets=int32_tensor([0, *accumulate(part.run_starts.numel() for part in parts)]),
        directory_kinds=int32_tensor([part.kind for part in parts]),
        directory=torch.cat([part.directory for part in parts]),
        directory_offsets=torch.tensor(
            [
                -1 if part.kind == Directory.RANKED else end - part.directory.numel()
                for part, end in zip(parts, directory_ends, strict=True)
            ],
            dtype=torch.int64,
        ),
        **_scales(packed, ranges),
        **_zero_rows(packed, ranges, parts),
        **coding_tensors([part.coding for part in parts]),
    )


@dataclass(frozen=True)
class _Part:
    shape: TableShape
    kind: Directory
    weights: Tensor
    directory: Tensor
    run_records: Tensor
    run_starts: Tensor
    reads_zero_row: bool
    alignment: int = ALIGNMENT
    coding: TableCoding | None = None


def _is_whole(packed: PackedTables, rows: RowRange) -> bool:
    return rows.num_rows == packed.tables[rows.table].num_embeddings


def _chunks(rows: RowRange) -> list[tuple[int, int]]:
    end = rows.first_row + rows.num_rows
    return [(start, min(start + _CHUNK_ROWS, end)) for start in range(rows.first_row, end, _CHUNK_ROWS)]


def _runs_of(packed: PackedTables, table: int) -> slice:
    return slice(int(packed.run_offsets[table]), int(packed.run_offsets[table + 1]))


def _locate(packed: PackedTables, table: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    shape, own = packed.tables[table], _runs_of(packed, table)
    return locate_consecutive(
        start,
        stop,
        Directory(int(packed.directory_kinds[table])),
        packed.directory[max(int(packed.directory_offsets[table]), 0) :],
        shape.num_embeddings,
        row_bytes(shape.embedding_dim, 1),
        packed.run_records[own],
        packed.run_starts[own],
    )


def _whole(packed: PackedTables, t: int) -> _Part:
    starts = [*packed.weights_offsets.tolist(), packed.weights.numel() - END_PADDING]
    offset = int(packed.directory_offsets[t])
    following = [start for start in packed.directory_offsets[t + 1 :].tolist() if start >= 0]
    end = following[0] if following else packed.directory.numel()
    own = _runs_of(packed, t)
    coding, alignment, stop = None, ALIGNMENT, starts[t + 1]
    if packed.components_of(t) is not None:
        coding = coding_of_table(packed, t, ordered=False)
        layout = lay_out_coded_table(packed.tables[t].name, coding, Directory.RANKED)
        alignment, stop = layout.alignment, starts[t] + layout.end
    return _Part(
        packed.tables[t],
        Directory(int(packed.directory_kinds[t])),
        packed.weights[starts[t] : stop],
        packed.directory[offset:end] if offset >= 0 else packed.directory[:0],
        packed.run_records[own],
        packed.run_starts[own],
        True,
        alignment,
        coding,
    )


def _range(packed: PackedTables, rows: RowRange) -> _Part:
    shape, table_weights = packed.tables[rows.table], packed.weights[int(packed.weights_offsets[rows.table]) :]
    widths = coding_of_range(packed, rows)
    if isinstance(widths, TableCoding):
        return _coded_range(packed, rows, widths)
    layout = choose_directory(f"{shape.name}/{rows.first_row}", widths)
    directory = torch.zeros(aligned(layout.directory_bytes), dtype=torch.uint8)
    write_directory(widths, layout, directory[: layout.directory_bytes])
    weights = torch.zeros(aligned(layout.end), dtype=torch.uint8)
    run_records = torch.tensor([run.record for run in layout.runs], dtype=torch.int64).view(len(layout.runs), 2)
    run_starts = int32_tensor([run.first for run in layout.runs])
    unit = row_bytes(shape.embedding_dim, 1)
    for start, stop in _chunks(rows):
        sources, bits = _locate(packed, rows.table, start, stop)
        targets, same_bits = locate_consecutive(
            start - rows.first_row,
            stop - rows.first_row,
            layout.directory,
            directory,
            rows.num_rows,
            unit,
            run_records,
            run_starts,
        )
        if not torch.equal(bits, same_bits):
            raise RuntimeError(f"table {layout.name}: its new directory does not have the widths of its rows")
        for width in bits.unique().tolist():
            if width:
                chosen = (bits == width).nonzero()
                row = torch.arange(width * unit)
                weights[(targets[chosen] >> 3) + row] = table_weights[(sources[chosen] >> 3) + row]
    return _Part(
        TableShape(layout.name, rows.num_rows, shape.embedding_dim),
        layout.directory,
        weights,
        directory,
        run_records,
        run_starts,
        layout.has_zero_bits,
    )


def _coded_range(packed: PackedTables, rows: RowRange, coding: TableCoding) -> _Part:
    """Plain rows byte by byte, transformed ones code by code, as they start at any bit."""
    shape, table_weights = packed.tables[rows.table], packed.weights[int(packed.weights_offsets[rows.table]) :]
    layout = lay_out({f"{shape.name}/{rows.first_row}": coding}).tables[0]
    directory = torch.zeros(aligned(layout.directory_bytes), dtype=torch.uint8)
    ranks = write_coded_directory(coding, layout, directory[: layout.directory_bytes])
    weights = torch.zeros(layout.end, dtype=torch.uint8)
    bounds = torch.tensor(coding.bounds[1:], dtype=torch.int64)
    for start, stop in _chunks(rows):
        located = packed.locate(rows.table, torch.arange(start, stop))
        own = slice(start - rows.first_row, stop - rows.first_row)
        places = torch.arange(own.start, own.stop) if ranks is None else ranks[own].long()
        groups = torch.searchsorted(bounds, places, right=True)
        for g in groups.unique().tolist():
            run = layout.runs[g]
            chosen = (groups == g).nonzero().squeeze(1)
            if not bool((located.coding[chosen] == run.coding).all()):
                raise RuntimeError(f"table {layout.name}: its new directory does not have the codings of its rows")
            sources, targets = located.starts[chosen], run.base + (places[chosen] - run.first) * run.row_bits
            if run.is_transformed:
                bits = component_bits(run.coding, coding.components)
                write_codes_(weights, targets, bits, read_codes(table_weights, sources, bits))
            elif run.row_bits:
                row = torch.arange(run.row_bits // 8)
                weights[(targets >> 3).unsqueeze(1) + row] = table_weights[(sources >> 3).unsqueeze(1) + row]
    return _Part(
        TableShape(layout.name, rows.num_rows, shape.embedding_dim),
        layout.directory,
        weights,
        directory,
        torch.tensor([run.record for run in layout.runs], dtype=torch.int64),
        int32_tensor([run.first for run in layout.runs]),
        layout.has_zero_bits,
        layout.alignment,
        coding,
    )


def _scales(packed: PackedTables, ranges: Sequence[RowRange]) -> dict[str, Tensor]:
    """The scale sets in use, in the order of their first table."""
    index = [int(packed.scale_index[rows.table]) for rows in ranges]
    used = list(dict.fromkeys(s for s in index if s >= 0))
    dims = {s: packed.tables[rows.table].embedding_dim for s, rows in zip(index, ranges, strict=True)}
    starts = {s: int(packed.beta_offsets[s]) for s in used}
    return {
        "alpha": packed.alpha[used],
        "beta": torch.cat([packed.beta[:0], *(packed.beta[starts[s] : starts[s] + dims[s]] for s in used)]),
        "beta_offsets": int32_tensor([0, *accumulate(dims[s] for s in used)][:-1]),
        "scale_index": int32_tensor([used.index(s) if s >= 0 else -1 for s in index]),
    }


def _zero_rows(packed: PackedTables, ranges: Sequence[RowRange], parts: Sequence[_Part]) -> dict[str, Tensor]:
    offsets: list[int] = []
    vectors: list[Tensor] = [packed.zero_rows[:0]]
    following = 0
    for rows, part in zip(ranges, parts, strict=True):
        start = int(packed.zero_row_offsets[rows.table])
        if start < 0 or not part.reads_zero_row:
            offsets.append(-1)
            continue
        offsets.append(following)
        vectors.append(packed.zero_rows[start : start + part.shape.embedding_dim])
        following += part.shape.embedding_dim
    return {"zero_rows": torch.cat(vectors), "zero_row_offsets": int32_tensor(offsets)}
