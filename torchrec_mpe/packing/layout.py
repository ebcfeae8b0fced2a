"""Where every row of a collection of packed tables lies, and how many bytes lead to it."""

from dataclasses import dataclass
from itertools import accumulate

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, NIBBLE_ROWS, Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.ops.reference.run_coding import TRANSFORMED, level_count
from torchrec_mpe.ops.reference.wavelet_ranks import Split
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding
from torchrec_mpe.packing.wavelet_splits import choose_splits, wavelet_bytes

ALIGNMENT = 64
"""Bytes to whose multiple tables, runs and directories are aligned: a cache line, and the widest vector load."""

CODED_ALIGNMENT = 8
"""Bytes to whose multiple coded tables are aligned at least: their tables may be small, and every byte counts."""

END_PADDING = 64
"""Bytes after the last row, so that a 64-byte load that starts inside any row stays in the buffer."""

MAX_ROWS = 2**31 - 1
"""Rows of a table: ranks are stored as int32."""

RUN_BYTES = 20
"""Bytes of a run: its record and its start."""


def aligned(size: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Run:
    """Neighbouring ranks of one coding, stored one after another.

    Attributes:
        first (int): rank of the first row.
        rows (int): number of rows.
        coding (int): of plain rows the bit-width, 0 to 8; of transformed rows the widths of their blocks, see
            :mod:`torchrec_mpe.ops.reference.run_coding`.
        row_bits (int): bits of a row.
        base (int): bit of the table where the first row starts; 0 for rows without bits, which are not stored.
    """

    first: int
    rows: int
    coding: int
    row_bits: int
    base: int

    @property
    def is_transformed(self) -> bool:
        """Whether rows are codes of components."""
        return bool(self.coding & TRANSFORMED)

    @property
    def bits(self) -> int:
        """The bit-width of plain rows."""
        return self.coding

    @property
    def first_byte(self) -> int:
        """The byte of the table where the first row starts."""
        return self.base // 8

    @property
    def end(self) -> int:
        """The byte after the last row's."""
        return -(-(self.base + self.rows * self.row_bits) // 8)

    @property
    def record(self) -> tuple[int, int]:
        """The run's 16 bytes as two little-endian int64: where rank 0 would lie, and row_bits with the coding above it.

        The row of rank r lies at bit ``record[0] + r * row_bits`` of its table. A plain run of 0 bits is all zeros, so
        that a kernel without branches reads the table's first bytes and multiplies them by ``alpha[0] = 0``::

            byte    0                             8             12            16
                    | int64 base - first*row_bits | u32 row_bits | u32 coding |
        """
        high = self.coding - (1 << 32) if self.is_transformed else self.coding  # an int64's highest bit is its sign
        return self.base - self.first * self.row_bits, self.row_bits | high << 32

    @staticmethod
    def from_record(record: tuple[int, int], first: int, rows: int) -> "Run":
        """The run whose :attr:`record` this is."""
        size, coding = record[1] & 0xFFFFFFFF, record[1] >> 32 & 0xFFFFFFFF
        return Run(first, rows, coding, size, record[0] + first * size)


@dataclass(frozen=True)
class TableLayout:
    """The directory kind, widths and runs of one table.

    Attributes:
        name (str): table.
        num_embeddings (int): rows.
        embedding_dim (int): elements of a row.
        directory (Directory): how ids find rows.
        rows_per_width (tuple[int, ...]): plain rows of each bit-width, 9 numbers; all others are transformed.
        runs (tuple[Run, ...]): in rank order; none with NIBBLE and BITMAP_NIBBLE, and with BITMAP the kept rows'.
        components (Optional[int]): K of a coded table; None: it is not coded.
        splits (tuple[Split, ...]): of WAVELET, the root first.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    directory: Directory
    rows_per_width: tuple[int, ...]
    runs: tuple[Run, ...]
    components: int | None = None
    splits: tuple[Split, ...] = ()

    @property
    def has_zero_bits(self) -> bool:
        """Whether any row is 0 bits wide."""
        return self.rows_per_width[0] > 0

    @property
    def kept_rows(self) -> int:
        """Rows of more than 0 bits."""
        return self.num_embeddings - self.rows_per_width[0]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the packed rows alone."""
        if self.components is not None:
            return -(-sum(run.rows * run.row_bits for run in self.runs) // 8)
        return sum(rows * row_bytes(self.embedding_dim, bits) for bits, rows in enumerate(self.rows_per_width))

    @property
    def end(self) -> int:
        """The byte after the last row, counted from the table's first byte; gaps between runs lie before it."""
        return max((run.end for run in self.runs if run.row_bits), default=0) if self.runs else self.payload_bytes

    @property
    def alignment(self) -> int:
        """Bytes to whose multiple the table's first byte is aligned: 64, but in a coded table what its runs need."""
        if self.components is None:
            return ALIGNMENT
        return max(
            (run_alignment(run.row_bits // 8) for run in self.runs if not run.is_transformed), default=CODED_ALIGNMENT
        )

    @property
    def levels(self) -> int:
        """Levels of a coded table's runs."""
        return sum(level_count(run.coding, self.components) for run in self.runs) if self.components is not None else 0

    @property
    def transformed_bits(self) -> int:
        """Bits of all transformed rows."""
        return sum(run.rows * run.row_bits for run in self.runs if run.is_transformed)

    @property
    def transform_bytes(self) -> int:
        """Bytes of levels, basis and mean."""
        if self.components is None:
            return 0
        return 2 * self.levels + 2 * (self.components + 1) * self.embedding_dim

    @property
    def bitmap_bytes(self) -> int:
        """Bytes of the bitmap lines."""
        has_bitmap = self.directory in (Directory.BITMAP, Directory.BITMAP_NIBBLE)
        return -(-self.num_embeddings // BITMAP_ROWS) * LINE_BYTES if has_bitmap else 0

    @property
    def directory_bytes(self) -> int:
        """Bytes of the remap or the lines."""
        match self.directory:
            case Directory.RANKED:
                return 0
            case Directory.REMAP:
                return 4 * self.num_embeddings
            case Directory.NIBBLE:
                return -(-self.num_embeddings // NIBBLE_ROWS) * LINE_BYTES
            case Directory.BITMAP:
                return self.bitmap_bytes
            case Directory.BITMAP_NIBBLE:
                return self.bitmap_bytes + -(-self.kept_rows // NIBBLE_ROWS) * LINE_BYTES
            case Directory.WAVELET:
                return wavelet_bytes(self.splits)

    @property
    def total_bytes(self) -> int:
        """Bytes that depend on the directory kind: rows, runs, remap or lines, each aligned."""
        return aligned(self.end) + aligned(self.directory_bytes) + len(self.runs) * RUN_BYTES + self.transform_bytes


@dataclass(frozen=True)
class CollectionLayout:
    """A table-batched collection: like FBGEMM's TBE, all tables share one buffer, and here one directory.

    ::

        weights    0                   64-byte aligned                              weights_bytes
                   | t0: run 0 | run 1 | t1: run 0 |...                  | 64 zeros |
        directory  0                   64-byte aligned                   directory_bytes
                   | t0: lines         | t2: remap |...                  |
    """

    tables: tuple[TableLayout, ...]

    @property
    def weights_offsets(self) -> tuple[int, ...]:
        """The byte where each table starts."""
        return self._spans[:-1]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all rows, alignment and the padding at the end."""
        return self._spans[-1] + END_PADDING

    @property
    def _spans(self) -> tuple[int, ...]:
        """Where each table starts, and where the last one ends."""
        spans, end = [], 0
        for table in self.tables:
            start = -(-end // table.alignment) * table.alignment
            end = start + (aligned(table.end) if table.components is None else table.end)
            spans.append(start)
        return (*spans, aligned(end))

    @property
    def directory_offsets(self) -> tuple[int, ...]:
        """The byte where each table's part of the directory starts; -1: RANKED."""
        starts = (0, *accumulate(aligned(table.directory_bytes) for table in self.tables))[:-1]
        return tuple(
            -1 if table.directory == Directory.RANKED else start
            for table, start in zip(self.tables, starts, strict=True)
        )

    @property
    def directory_bytes(self) -> int:
        """Bytes of all remaps and lines, aligned."""
        return sum(aligned(table.directory_bytes) for table in self.tables)


def lay_out_table(name: str, widths: TableBitWidths, directory: Directory) -> TableLayout:
    """Place every run of a table under a feasible directory kind; work is per run, never per row.

    Raises:
        ValueError: if the table has more rows than int32 ranks can count.
    """
    if widths.num_embeddings > MAX_ROWS:
        raise ValueError(f"table {name}: {widths.num_embeddings} rows are more than the format's {MAX_ROWS}")
    rows_per_width = tuple(widths.rows_per_width())
    starts = stored_runs(widths, directory)
    rows = widths.num_embeddings - (rows_per_width[0] if directory == Directory.BITMAP else 0)
    stops = [*(first for first, _ in starts[1:]), rows]
    runs: list[Run] = []
    end = 0
    for (first, bits), stop in zip(starts, stops, strict=False):  # kinds without runs have a stop all the same
        base = aligned(end) if bits else 0
        run = Run(first, stop - first, bits, 8 * row_bytes(widths.embedding_dim, bits), 8 * base)
        end = run.end if bits else end
        runs.append(run)
    return TableLayout(name, widths.num_embeddings, widths.embedding_dim, directory, rows_per_width, tuple(runs))


def run_alignment(size: int) -> int:
    """Bytes to which a run of plain rows of ``size`` bytes is aligned in a coded table.

    The largest power of two that divides a row's bytes, so that rows cross no more cache lines than they must, and
    little is lost: at least 8, as tables begin so, at most 64.
    """
    return min(max(size & -size, CODED_ALIGNMENT), ALIGNMENT)


def lay_out_coded_table(name: str, coding: TableCoding, directory: Directory) -> TableLayout:
    """Place every run of a coded table, one after another in the frequency order.

    Raises:
        ValueError: if the table has more rows than int32 ranks can count, or the directory cannot serve it.
    """
    rows, dim = coding.num_embeddings, coding.embedding_dim
    if rows > MAX_ROWS:
        raise ValueError(f"table {name}: {rows} rows are more than the format's {MAX_ROWS}")
    splits = choose_splits(coding.run_rows) if directory == Directory.WAVELET else ()
    if directory not in (Directory.RANKED, Directory.REMAP) and not splits:
        raise ValueError(f"table {name}: a coded table like this cannot have a {directory.name.lower()} directory")
    runs: list[Run] = []
    rows_per_width = [0] * (MAX_BITS + 1)
    end = 0
    for first, stop, group in zip(coding.bounds, coding.bounds[1:], coding.groups, strict=False):
        size = group.row_bits(dim)
        base = end if size else 0
        if isinstance(group, PlainRows):
            rows_per_width[group.bits] += stop - first
            if size:
                alignment = 8 * run_alignment(size // 8)
                base = -(-base // alignment) * alignment
        run = Run(first, stop - first, group.record_coding, size, base)
        end = run.base + run.rows * size if size else end
        runs.append(run)
    return TableLayout(name, rows, dim, directory, tuple(rows_per_width), tuple(runs), coding.components, splits)


def stored_runs(widths: TableBitWidths, directory: Directory) -> list[tuple[int, int]]:
    """The runs in which a table's rows are stored: (first rank, bit-width) of each, ranks increasing.

    RANKED keeps the order of the ids. REMAP is free to choose one: each bit-width becomes one run, widest first, rows
    in rank order inside it; its stored ranks are those of :func:`stored_rank_shifts`. BITMAP has one run of kept rows.
    """
    match directory:
        case Directory.RANKED:
            return widths.runs()
        case Directory.BITMAP:
            return [(0, max(widths.bits))]
        case Directory.REMAP:
            runs: list[tuple[int, int]] = []
            first = 0
            rows = widths.rows_per_width()
            for bits in range(MAX_BITS, -1, -1):
                if rows[bits]:
                    runs.append((first, bits))
                    first += rows[bits]
            return runs
    return []


def stored_rank_shifts(widths: TableBitWidths) -> list[int]:
    """What to add to the frequency ranks of each segment of ``widths`` to get the stored ranks of REMAP."""
    following = {bits: first for first, bits in stored_runs(widths, Directory.REMAP)}
    shifts: list[int] = []
    for low, high, bits in zip(widths.bounds, widths.bounds[1:], widths.bits, strict=False):
        shifts.append(following[bits] - low)
        following[bits] += high - low
    return shifts
