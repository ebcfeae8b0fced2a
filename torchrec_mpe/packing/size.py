"""Bytes of packed tables by kind: every byte is counted, none estimated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torchrec_mpe.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.layout import TableLayout, lay_out
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.text_table import text_table

_FP32 = 4
_INT32 = 4
_INT64 = 8
_RUN_BYTES = 16 + _INT32  # record and start
_TABLE_DIRECTORY_BYTES = _INT32 + _INT32 + _INT64  # run_offsets, rows_per_table, remap_offsets


@dataclass(frozen=True)
class ByteCounts:
    """Bytes by kind.

    Attributes:
        payload (int): packed rows, dims padded to a multiple of 8 included.
        directory (int): run records and starts, remap, per-table offsets.
        scales (int): alpha, beta and their indices.
        zero_rows (int): the vectors of 0-bit rows and their offsets.
        padding (int): alignment before runs and at the payload's end.
        fp32_bytes (int): bytes of the fp32 tables, ``num_embeddings * embedding_dim * 4``.
    """

    payload: int
    directory: int
    scales: int
    zero_rows: int
    padding: int
    fp32_bytes: int

    @property
    def total(self) -> int:
        """All bytes of the packed tables."""
        return self.payload + self.directory + self.scales + self.zero_rows + self.padding

    @property
    def compression_ratio(self) -> float:
        """fp32 bytes over all bytes."""
        return self.fp32_bytes / self.total

    def to_dict(self) -> dict[str, float]:
        """Bytes by kind, total, fp32_bytes and compression_ratio, for JSON."""
        counts: dict[str, float] = {field.name: getattr(self, field.name) for field in fields(ByteCounts)}
        return {**counts, "total": self.total, "compression_ratio": round(self.compression_ratio, 4)}


@dataclass(frozen=True)
class TableSize(ByteCounts):
    """Bytes of one table. What tables share is counted with the first that uses it, the end padding with the last.

    Attributes:
        name (str): table.
        num_embeddings (int): rows.
        embedding_dim (int): elements of a row.
        rows_per_width (tuple[int, ...]): rows of each bit-width, 9 numbers.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    rows_per_width: tuple[int, ...]


@dataclass(frozen=True)
class SizeReport(ByteCounts):
    """Bytes of a collection of packed tables: per table, and summed.

    Example::

        >>> report = packed_bytes({"t": TableBitWidths(1000, 16, (0, 100, 1000), (4, 0))})
        >>> report.payload, report.total, round(report.compression_ratio, 1)
        (800, 1100, 58.2)
        >>> print(report)
        table  rows  dim  payload  directory  scales  zero_rows  padding  total  ratio
        t      1000   16      800         60     108         68       64   1100  58.2x
        all    1000           800         60     108         68       64   1100  58.2x
    """

    tables: tuple[TableSize, ...]

    def __str__(self) -> str:
        head = ("table", "rows", "dim", "payload", "directory", "scales", "zero_rows", "padding", "total", "ratio")
        lines: list[tuple[str, ...]] = [head]
        for table in self.tables:
            lines.append((table.name, str(table.num_embeddings), str(table.embedding_dim), *_columns(table)))
        lines.append(("all", str(sum(table.num_embeddings for table in self.tables)), "", *_columns(self)))
        return text_table(lines)


def packed_bytes(
    tables: Mapping[str, TableBitWidths], *, shared_scales: bool = True, learned_zero_rows: bool = True
) -> SizeReport:
    """The exact size of tables packed at these widths, without packing them; work is per run, not per row.

    Args:
        tables (Mapping[str, TableBitWidths]): table names, in the collection's order, to widths.
        shared_scales (bool): tables of one embedding dimension come with equal alpha and beta, stored once. False:
            every table has its own.
        learned_zero_rows (bool): a table with 0-bit rows stores the vector that they read. False: they read zeros.

    Returns:
        SizeReport: equal to :func:`size_report` of the packed tables.
    """
    layout = lay_out(tables)
    dims = [table.embedding_dim for table in layout.tables]
    sets = [dims.index(dim) for dim in dims] if shared_scales else list(range(len(dims)))
    stored = [learned_zero_rows and table.has_zero_bits for table in layout.tables]
    return _report(layout.tables, layout.payload_bytes, sets, stored)


def size_report(packed: PackedTables) -> SizeReport:
    """The size of packed tables, read from their tensors.

    Raises:
        ValueError: if the tensors hold bytes that no table accounts for.
    """
    stored = [offset >= 0 for offset in packed.zero_row_offsets.tolist()]
    report = _report(packed.layouts(), packed.payload.numel(), packed.scale_index.tolist(), stored)
    if report.total != packed.nbytes:
        raise ValueError(f"the tables account for {report.total} bytes, their tensors hold {packed.nbytes}")
    return report


def _report(
    layouts: Sequence[TableLayout], payload_bytes: int, scale_sets: Sequence[int], zero_row: Sequence[bool]
) -> SizeReport:
    sizes: list[TableSize] = []
    end = 0
    for t, table in enumerate(layouts):
        payload = padding = 0
        for run in table.runs:
            if run.bits:
                padding += run.base - end
                payload += run.rows * run.row_bytes
                end = run.end
        if t == len(layouts) - 1:
            padding += payload_bytes - end
        directory = len(table.runs) * _RUN_BYTES + _TABLE_DIRECTORY_BYTES
        directory += table.num_embeddings * _INT32 if table.remapped else 0
        directory += _INT32 if t == 0 else 0  # run_offsets has T + 1 entries
        scales = _INT32
        if scale_sets[t] not in scale_sets[:t]:
            scales += (MAX_BITS + 1 + table.embedding_dim) * _FP32 + _INT32
        zero_rows = _INT32 + (table.embedding_dim * _FP32 if zero_row[t] else 0)
        sizes.append(
            TableSize(
                payload=payload,
                directory=directory,
                scales=scales,
                zero_rows=zero_rows,
                padding=padding,
                fp32_bytes=table.num_embeddings * table.embedding_dim * _FP32,
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                rows_per_width=tuple(table.rows_per_width()),
            )
        )
    sums = {field.name: sum(getattr(size, field.name) for size in sizes) for field in fields(ByteCounts)}
    return SizeReport(**sums, tables=tuple(sizes))


def _columns(size: ByteCounts) -> tuple[str, ...]:
    numbers = (size.payload, size.directory, size.scales, size.zero_rows, size.padding, size.total)
    return (*(str(number) for number in numbers), f"{size.compression_ratio:.1f}x")
