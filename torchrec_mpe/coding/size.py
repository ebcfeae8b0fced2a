"""Bytes of coded tables before they are packed: every byte is counted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchrec_mpe.packing.table_coding import PlainRows, TableCoding

RUN_BYTES = 20
"""The record of a run, and its first rank."""

LEVEL_BYTES = 2
"""A bfloat16."""

_TABLE_BYTES = 48  # offsets, kinds and sizes of a table, one number each
_COLLECTION_BYTES = 4 + 64  # the end of the runs, and the padding behind the last row
_LINE_BITS = 8 * 64


@dataclass(frozen=True)
class CodedRun:
    """Neighbouring rows with one coding.

    Attributes:
        rows (int): number of rows.
        row_bits (int): bits of each.
        levels (int): stored levels.
        plain (bool): whether rows start at whole bytes.
    """

    rows: int
    row_bits: int
    levels: int
    plain: bool

    @property
    def alignment_bits(self) -> int:
        """Plain rows: the largest power of 2 that divides a row, at most 64 bytes."""
        return min(self.row_bits & -self.row_bits, _LINE_BITS) if self.plain and self.row_bits else 1


@dataclass(frozen=True)
class TableRuns:
    """What the bytes of a coded table depend on.

    Attributes:
        runs (tuple[CodedRun, ...]): in rank order.
        num_embeddings (int): rows.
        embedding_dim (int): D.
        components (int): K.
        remapped (bool): whether ids are not ranks: an int32 a row.
        zero_row (bool): whether it stores what rows of 0 bits read, float32 [D].
    """

    runs: tuple[CodedRun, ...]
    num_embeddings: int
    embedding_dim: int
    components: int
    remapped: bool
    zero_row: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of its rows, bytes that they are aligned to, and all other bytes."""
        return self.row_bytes, self.alignment, self.metadata_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows, with the gaps between runs."""
        end = 0
        for run in self.runs:
            if run.row_bits:
                end = _aligned(end, run.alignment_bits) + run.rows * run.row_bits
        return -(-end // 8)

    @property
    def alignment(self) -> int:
        """Bytes that the table's first row is aligned to."""
        return max([8, *(run.alignment_bits // 8 for run in self.runs)])

    @property
    def metadata_bytes(self) -> int:
        """All bytes but those of rows."""
        levels = sum(run.levels for run in self.runs)
        basis = 2 * (self.components + 1) * self.embedding_dim
        directory = _aligned(4 * self.num_embeddings, 64) if self.remapped else 0
        zero_row = 4 * self.embedding_dim if self.zero_row else 0
        return _TABLE_BYTES + RUN_BYTES * len(self.runs) + LEVEL_BYTES * levels + basis + zero_row + directory


def coded_bytes(tables: Iterable[TableRuns]) -> int:
    """Bytes of a collection of coded tables, packed one after another."""
    return collection_bytes([t.sizes for t in tables])


def collection_bytes(tables: Sequence[tuple[int, int, int]]) -> int:
    """The same from the sizes of each table."""
    end = 0
    for rows, alignment, _ in tables:
        end = _aligned(end, alignment) + rows
    return _COLLECTION_BYTES + end + sum(metadata for _, _, metadata in tables)


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def bytes_of(codings: Iterable[TableCoding]) -> int:
    """Bytes of a collection of tables coded like this."""
    return coded_bytes(_runs(coding) for coding in codings)


def _runs(coding: TableCoding) -> TableRuns:
    dim = coding.embedding_dim
    runs = tuple(
        CodedRun(stop - first, group.row_bits(dim), len(group.levels), isinstance(group, PlainRows))
        for first, stop, group in zip(coding.bounds, coding.bounds[1:], coding.groups, strict=False)
    )
    return TableRuns(
        runs, coding.num_embeddings, dim, coding.components, coding.order is not None, coding.zero_row is not None
    )
