"""Where every row of a collection of packed tables lies: runs of equal width in one payload buffer."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchrec_mpe.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.bitpack import row_bytes

ALIGNMENT = 64
"""Bytes to whose multiple the first row of every run is aligned: a cache line, and the widest vector load."""

END_PADDING = 64
"""Bytes after the last row, so that a 64-byte load that starts inside any row stays in the payload."""

MAX_ROWS = 2**31 - 1
"""Rows of a table: ranks are stored as int32."""


@dataclass(frozen=True)
class Run:
    """Neighbouring ranks of one bit-width, stored one after another.

    Attributes:
        first (int): rank of the first row.
        rows (int): number of rows.
        bits (int): bit-width, 0 to 8.
        row_bytes (int): bytes of a row.
        base (int): byte of the payload where the first row starts; 0 for 0 bits, which has no payload.
    """

    first: int
    rows: int
    bits: int
    row_bytes: int
    base: int

    @property
    def end(self) -> int:
        """The byte after the last row."""
        return self.base + self.rows * self.row_bytes

    @property
    def record(self) -> tuple[int, int]:
        """The run's 16 bytes as two little-endian int64: where rank 0 would lie, and row_bytes with bits above it.

        A row of rank r lies at ``record[0] + r * row_bytes``. A 0-bit run is all zeros, so that a kernel without
        branches reads the payload's first bytes and multiplies them by ``alpha[0] = 0``::

            byte    0                              8              12             16
                    | int64 base - first*row_bytes | u32 row_bytes | u32 bits    |
        """
        return self.base - self.first * self.row_bytes, self.row_bytes | self.bits << 32

    @staticmethod
    def from_record(record: tuple[int, int], first: int, rows: int) -> "Run":
        """The run whose :attr:`record` this is."""
        size, bits = record[1] & 0xFFFFFFFF, record[1] >> 32
        return Run(first, rows, bits, size, record[0] + first * size)


@dataclass(frozen=True)
class TableLayout:
    """The runs of one table in rank order, and whether row ids need a remap to become ranks."""

    name: str
    num_embeddings: int
    embedding_dim: int
    runs: tuple[Run, ...]
    remapped: bool

    @property
    def has_zero_bits(self) -> bool:
        """Whether any row is 0 bits wide."""
        return any(run.bits == 0 for run in self.runs)

    def rows_per_width(self) -> list[int]:
        """Rows of each bit-width, 9 numbers."""
        rows = [0] * (MAX_BITS + 1)
        for run in self.runs:
            rows[run.bits] += run.rows
        return rows


@dataclass(frozen=True)
class CollectionLayout:
    """The layout of a table-batched collection: like FBGEMM's TBE, all tables share one payload buffer.

    ::

        byte 0                 64-byte aligned         64-byte aligned           payload_bytes
        | t0: rows of run 0 |..| t0: rows of run 1 |...| t1: rows of run 0 | 64 zeros |
    """

    tables: tuple[TableLayout, ...]
    payload_bytes: int


def stored_runs(widths: TableBitWidths) -> list[tuple[int, int]]:
    """The runs in which a table's rows are stored: (first rank, bit-width) of each, ranks increasing.

    Ids that are ranks keep their order. A table with a remap is free to choose one: each bit-width becomes one run,
    widest first, rows in rank order inside it; its stored ranks are those of :func:`stored_rank_shifts`.
    """
    if widths.ranks is None:
        return widths.runs()
    runs: list[tuple[int, int]] = []
    first = 0
    rows = widths.rows_per_width()
    for bits in range(MAX_BITS, -1, -1):
        if rows[bits]:
            runs.append((first, bits))
            first += rows[bits]
    return runs


def stored_rank_shifts(widths: TableBitWidths) -> list[int]:
    """What to add to the frequency ranks of each segment of ``widths`` to get stored ranks."""
    if widths.ranks is None:
        return [0] * len(widths.bits)
    following = {bits: first for first, bits in stored_runs(widths)}
    shifts: list[int] = []
    for low, high, bits in zip(widths.bounds, widths.bounds[1:], widths.bits, strict=False):
        shifts.append(following[bits] - low)
        following[bits] += high - low
    return shifts


def lay_out(tables: Mapping[str, TableBitWidths]) -> CollectionLayout:
    """Place every run of every table; work is per run, never per row.

    Args:
        tables (Mapping[str, TableBitWidths]): table names, in the order of the collection, to widths.

    Raises:
        ValueError: if a table has more rows than int32 ranks can count.
    """
    layouts: list[TableLayout] = []
    end = 0
    for name, widths in tables.items():
        if widths.num_embeddings > MAX_ROWS:
            raise ValueError(f"table {name}: {widths.num_embeddings} rows are more than the format's {MAX_ROWS}")
        starts = stored_runs(widths)
        stops = [first for first, _ in starts[1:]] + [widths.num_embeddings]
        runs: list[Run] = []
        for (first, bits), stop in zip(starts, stops, strict=True):
            base = -(-end // ALIGNMENT) * ALIGNMENT if bits else 0
            run = Run(first, stop - first, bits, row_bytes(widths.embedding_dim, bits), base)
            end = run.end if bits else end
            runs.append(run)
        layouts.append(
            TableLayout(name, widths.num_embeddings, widths.embedding_dim, tuple(runs), widths.ranks is not None)
        )
    return CollectionLayout(tuple(layouts), end + END_PADDING)
