"""Bytes of coded tables while their coding is chosen: those of ``packed_bytes``, from nothing but rows and widths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from torchrec_mpe.packing.layout import CODED_ALIGNMENT, END_PADDING, RUN_BYTES, aligned, run_alignment
from torchrec_mpe.packing.wavelet_splits import choose_splits, remap_bytes, wavelet_bytes

LEVEL_BYTES = 2
"""A bfloat16."""

_TABLE_BYTES = 48  # offsets, kinds and sizes of a table, one number each
_COLLECTION_BYTES = 4 + END_PADDING  # the end of the runs


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
    def alignment(self) -> int:
        """Bytes to whose multiple plain rows are aligned; 0: transformed rows, not even to whole bytes."""
        return run_alignment(self.row_bits // 8) if self.plain else 0


@dataclass(frozen=True)
class TableRuns:
    """What the bytes of a coded table depend on.

    Attributes:
        runs (tuple[CodedRun, ...]): in rank order.
        num_embeddings (int): rows.
        embedding_dim (int): D.
        components (int): K.
        remapped (bool): whether ids are not in the frequency order: a directory leads from them to ranks.
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
                end = _next(end, 8 * run.alignment or 1) + run.rows * run.row_bits
        return -(-end // 8)

    @property
    def alignment(self) -> int:
        """Bytes to whose multiple the table's first row is aligned."""
        return max([CODED_ALIGNMENT, *(run.alignment for run in self.runs)])

    @property
    def metadata_bytes(self) -> int:
        """All bytes but those of rows."""
        levels = sum(run.levels for run in self.runs)
        basis = 2 * (self.components + 1) * self.embedding_dim
        directory = 0
        if self.remapped and len(self.runs) > 1:
            splits = choose_splits(tuple(run.rows for run in self.runs))
            directory = wavelet_bytes(splits) if splits else remap_bytes(self.num_embeddings)
        zero_row = 4 * self.embedding_dim if self.zero_row else 0
        return _TABLE_BYTES + RUN_BYTES * len(self.runs) + LEVEL_BYTES * levels + basis + zero_row + directory


def smallest_bytes(counts: Mapping[str, Tensor], dims: Mapping[str, int]) -> int:
    """Bytes of coded tables without any bits: no budget can be smaller.

    Args:
        counts (Mapping[str, Tensor]): by table, [num_embeddings] lookups of each row.
        dims (Mapping[str, int]): embedding dimension of each table.
    """
    return coded_bytes(
        TableRuns(
            (CodedRun(len(of_rows), 0, 0, plain=True),),
            len(of_rows),
            dims[table],
            components=0,
            remapped=False,  # all rows are of one group
            zero_row=True,
        )
        for table, of_rows in counts.items()
    )


def coded_bytes(tables: Iterable[TableRuns]) -> int:
    """Bytes of a collection of coded tables, packed one after another."""
    return collection_bytes([t.sizes for t in tables])


def collection_bytes(tables: Sequence[tuple[int, int, int]]) -> int:
    """The same from the sizes of each table."""
    end = 0
    for rows, alignment, _ in tables:
        end = _next(end, alignment) + rows
    return _COLLECTION_BYTES + aligned(end) + sum(metadata for _, _, metadata in tables)


def _next(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
