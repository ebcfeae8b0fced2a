"""Bytes of packed tables by kind: every byte is counted, none estimated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torchrec_mpe.files.text_table import text_table
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.choose_directory import lay_out
from torchrec_mpe.packing.declared_layouts import declared_layouts
from torchrec_mpe.packing.layout import RUN_BYTES, TableLayout
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.table_coding import TableCoding

_FP32 = 4
_INT32 = 4
_INT64 = 8
_CODED_BYTES = 3 * _INT32  # levels_offsets, bases_offsets, components
# weights_offsets, rows_per_table, run_offsets, directory_kinds, directory_offsets
_TABLE_BYTES = _INT64 + _INT32 + _INT32 + _INT32 + _INT64


@dataclass(frozen=True)
class ByteCounts:
    """Bytes by kind.

    Attributes:
        payload (int): packed rows, dims padded to a multiple of 8 included.
        directory (int): remaps, nibble and bitmap lines, run records and starts, per-table offsets.
        scales (int): alpha, beta and their indices.
        transform (int): levels, bases and means of coded tables, and their offsets.
        zero_rows (int): the vectors of 0-bit rows and their offsets.
        padding (int): alignment of tables, runs and directories, and the end of the weights.
        fp32_bytes (int): bytes of the fp32 tables, ``num_embeddings * embedding_dim * 4``.
    """

    payload: int
    directory: int
    scales: int
    transform: int
    zero_rows: int
    padding: int
    fp32_bytes: int

    @property
    def total(self) -> int:
        """All bytes of the packed tables."""
        return self.payload + self.directory + self.scales + self.transform + self.zero_rows + self.padding

    @property
    def compression_ratio(self) -> float:
        """fp32 bytes over all bytes."""
        return self.fp32_bytes / self.total


@dataclass(frozen=True)
class TableSize(ByteCounts):
    """Bytes of one table. What tables share is counted with the first that uses it, the end padding with the last.

    Attributes:
        name (str): table.
        num_embeddings (int): rows.
        embedding_dim (int): elements of a row.
        directory_kind (str): how ids find rows, the name of a :class:`Directory` in lower case.
        rows_per_width (tuple[int, ...]): plain rows of each bit-width, 9 numbers.
        components (Optional[int]): K of a coded table; None: it is not coded.
        transformed_bits (int): bits of all transformed rows, which are those that are not plain.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    directory_kind: str
    rows_per_width: tuple[int, ...]
    components: int | None
    transformed_bits: int

    @property
    def transformed_rows(self) -> int:
        """Rows that are codes of components."""
        return self.num_embeddings - sum(self.rows_per_width)

    def describe_rows(self) -> str:
        """How many rows there are of each kind, such as "K=4, 20 of 8 bits, 980 transformed of 3.2 bits"."""
        parts = [] if self.components is None else [f"K={self.components}"]
        parts += [f"{rows:,} of {bits} bits" for bits, rows in enumerate(self.rows_per_width) if rows]
        if self.transformed_rows:
            parts.append(
                f"{self.transformed_rows:,} transformed of {self.transformed_bits / self.transformed_rows:.1f} bits"
            )
        return ", ".join(parts)


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
        kinds = ("payload", "directory", "scales", "transform", "zero_rows", "padding")
        lines: list[tuple[str, ...]] = [("table", "rows", "dim", *kinds, "total", "ratio")]
        for table in self.tables:
            lines.append((table.name, str(table.num_embeddings), str(table.embedding_dim), *_columns(table)))
        lines.append(("all", str(sum(table.num_embeddings for table in self.tables)), "", *_columns(self)))
        return text_table(lines)


def packed_bytes(
    tables: Mapping[str, TableBitWidths | TableCoding],
    *,
    directory: str | Mapping[str, str] = "auto",
    shared_scales: bool = True,
    learned_zero_rows: bool = True,
) -> SizeReport:
    """The exact size of tables packed at these widths, without packing them; work is per run, not per row.

    Args:
        tables (Mapping[str, TableBitWidths | TableCoding]): table names, in the collection's order, to widths or
            codings.
        directory (Union[str, Mapping[str, str]]): "auto", "ranked", "remap", "nibble" or "bitmap", for all tables or by
            table name, as in :class:`TableToPack`; "auto" for those that are not named.
        shared_scales (bool): tables of one embedding dimension come with equal alpha and beta, stored once. False:
            every table has its own.
        learned_zero_rows (bool): a table with 0-bit rows stores the vector that they read. False: they read zeros.

    Returns:
        SizeReport: equal to :func:`size_report` of the packed tables.

    Raises:
        ValueError: naming the table, if a directory cannot store its widths; or if one is chosen for no table.
    """
    layout = lay_out(tables, directory)
    dims = [table.embedding_dim if table.components is None else -1 for table in layout.tables]
    sets = [-1 if dim < 0 else dims.index(dim) if shared_scales else t for t, dim in enumerate(dims)]
    stored = [
        table.has_zero_bits and (widths.zero_row is not None if isinstance(widths, TableCoding) else learned_zero_rows)
        for table, widths in zip(layout.tables, tables.values(), strict=True)
    ]
    weights = _spans(layout.weights_offsets, layout.weights_bytes)
    lines = _spans(layout.directory_offsets, layout.directory_bytes)
    return _report(layout.tables, weights, lines, sets, stored)


def size_report(packed: PackedTables, rows_per_width: Sequence[Sequence[int]] | None = None) -> SizeReport:
    """The size of packed tables, read from their tensors.

    Args:
        packed (PackedTables): the tables.
        rows_per_width (Optional[Sequence[Sequence[int]]]): rows of each bit-width, 9 numbers a table, to leave remaps
            and lines unread.

    Raises:
        ValueError: if the tensors hold bytes that no table accounts for, or have other rows of a bit-width.
    """
    report = _report(
        packed.layouts() if rows_per_width is None else declared_layouts(packed, rows_per_width),
        _spans(packed.weights_offsets.tolist(), packed.weights.numel()),
        _spans(packed.directory_offsets.tolist(), packed.directory.numel()),
        packed.scale_index.tolist(),
        [offset >= 0 for offset in packed.zero_row_offsets.tolist()],
    )
    if report.total != packed.nbytes:
        raise ValueError(f"the tables account for {report.total} bytes, their tensors hold {packed.nbytes}")
    return report


def _spans(offsets: Sequence[int], size: int) -> list[int]:
    """Bytes from each table's offset to the next table's, or the end; 0 for an offset of -1."""
    spans: list[int] = []
    end = size
    for offset in reversed(offsets):
        spans.append(end - offset if offset >= 0 else 0)
        end = offset if offset >= 0 else end
    return spans[::-1]


def _report(
    layouts: Sequence[TableLayout],
    weights: Sequence[int],
    directories: Sequence[int],
    scale_sets: Sequence[int],
    zero_row: Sequence[bool],
) -> SizeReport:
    sizes: list[TableSize] = []
    for t, table in enumerate(layouts):
        directory = table.directory_bytes + len(table.runs) * RUN_BYTES + _TABLE_BYTES
        directory += _INT32 if t == 0 else 0  # run_offsets has T + 1 entries
        scales = _INT32
        if scale_sets[t] >= 0 and scale_sets[t] not in scale_sets[:t]:
            scales += (MAX_BITS + 1 + table.embedding_dim) * _FP32 + _INT32
        zero_rows = _INT32 + (table.embedding_dim * _FP32 if zero_row[t] else 0)
        sizes.append(
            TableSize(
                payload=table.payload_bytes,
                directory=directory,
                scales=scales,
                transform=table.transform_bytes + _CODED_BYTES,
                zero_rows=zero_rows,
                padding=weights[t] - table.payload_bytes + directories[t] - table.directory_bytes,
                fp32_bytes=table.num_embeddings * table.embedding_dim * _FP32,
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                directory_kind=table.directory.name.lower(),
                rows_per_width=table.rows_per_width,
                components=table.components,
                transformed_bits=table.transformed_bits,
            )
        )
    sums = {field.name: sum(getattr(size, field.name) for size in sizes) for field in fields(ByteCounts)}
    return SizeReport(**sums, tables=tuple(sizes))


def _columns(size: ByteCounts) -> tuple[str, ...]:
    numbers = (size.payload, size.directory, size.scales, size.transform, size.zero_rows, size.padding, size.total)
    return (*(str(number) for number in numbers), f"{size.compression_ratio:.1f}x")
