"""The tensors of a collection of packed tables."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, Directory
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.directory_lines import count_widths, kept_rows
from torchrec_mpe.packing.layout import Run, TableLayout


@dataclass(frozen=True)
class TableShape:
    """A table's name and logical shape."""

    name: str
    num_embeddings: int
    embedding_dim: int


@dataclass(frozen=True)
class PackedTables:
    """T packed tables in table-batched form: what the op ``packed_embedding_bag`` reads, and every stored byte.

    All rows lie in one buffer, as in FBGEMM's table-batched embedding (TBE). An id of table t finds its row by the
    table's directory, :class:`torchrec_mpe.ops.directory.Directory`. RANKED, REMAP and BITMAP end in a rank::

        rank = id (RANKED), its int32 in the directory (REMAP), or its kept rank (BITMAP; a cleared bit: 0 bits)
        run  = last k in [run_offsets[t], run_offsets[t + 1]) with run_starts[k] <= rank
        {offset, row_bytes, bits} = run_records[run]
        row  = weights[weights_offsets[t] + offset + rank * row_bytes :][:row_bytes]

    and NIBBLE and BITMAP_NIBBLE in a row start and width of their own. Then::

        bits > 0:  element d = (code - 2**(bits - 1)) * alpha[s, bits] + beta[beta_offsets[s] + d],  s = scale_index[t]
        bits = 0:  element d = zero_rows[zero_row_offsets[t] + d], or 0 if the offset is -1

    Attributes:
        tables (tuple[TableShape, ...]): names and logical shapes.
        weights (Tensor): uint8 [P], packed rows; tables and runs 64-byte aligned, 64 bytes of padding at the end.
        weights_offsets (Tensor): int64 [T], the byte where each table starts, multiples of 64.
        rows_per_table (Tensor): int32 [T].
        run_records (Tensor): int64 [R, 2], 16 bytes a run {int64 base - first*row_bytes, u32 row_bytes, u32 bits},
            base counted from the table's first byte; all zeros for a run of 0 bits.
        run_starts (Tensor): int32 [R], the rank of each run's first row; 0 for the first run of a table.
        run_offsets (Tensor): int32 [T + 1], the runs of each table; none with NIBBLE and BITMAP_NIBBLE.
        directory_kinds (Tensor): int32 [T], values of Directory.
        directory (Tensor): uint8 [Q], the remaps and lines of the tables, each table's 64-byte aligned, in order.
        directory_offsets (Tensor): int64 [T], the byte where each table's part of ``directory`` starts; -1: RANKED.
        alpha (Tensor): float32 [S, 9], step size of each bit-width for each of S scale sets; alpha[:, 0] = 0.
        beta (Tensor): float32, the offsets of the S scale sets one after another, D floats each.
        beta_offsets (Tensor): int32 [S], where each scale set's offset starts in ``beta``.
        scale_index (Tensor): int32 [T], the scale set of each table.
        zero_rows (Tensor): float32, what 0-bit rows read, D floats for each table that has one.
        zero_row_offsets (Tensor): int32 [T], where each table's vector starts in ``zero_rows``; -1: zeros.
    """

    tables: tuple[TableShape, ...]
    weights: Tensor
    weights_offsets: Tensor
    rows_per_table: Tensor
    run_records: Tensor
    run_starts: Tensor
    run_offsets: Tensor
    directory_kinds: Tensor
    directory: Tensor
    directory_offsets: Tensor
    alpha: Tensor
    beta: Tensor
    beta_offsets: Tensor
    scale_index: Tensor
    zero_rows: Tensor
    zero_row_offsets: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by attribute name, in the order of the op's arguments."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tables"}

    def cpu(self) -> "PackedTables":
        """The same tables on the CPU, where they are there already without a copy."""
        return PackedTables(self.tables, **{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def layouts(self) -> tuple[TableLayout, ...]:
        """Directory kind, widths and runs of each table, read from the tensors; nibbles are counted row by row."""
        kinds, directory_offsets = self.directory_kinds.tolist(), self.directory_offsets.tolist()
        layouts: list[TableLayout] = []
        for t, table in enumerate(self.tables):
            kind, rows = Directory(kinds[t]), table.num_embeddings
            lines = self.directory[max(directory_offsets[t], 0) :]
            has_bitmap = kind in (Directory.BITMAP, Directory.BITMAP_NIBBLE)
            kept = kept_rows(lines, rows) if has_bitmap else rows
            runs: tuple[Run, ...] = ()
            rows_per_width = [0] * (MAX_BITS + 1)
            if kind in (Directory.NIBBLE, Directory.BITMAP_NIBBLE):
                bitmap = -(-rows // BITMAP_ROWS) * LINE_BYTES if has_bitmap else 0
                rows_per_width = count_widths(lines[bitmap:], kept)
            else:
                runs = self._runs(t, kept)
                for run in runs:
                    rows_per_width[run.bits] += run.rows
            if has_bitmap:
                rows_per_width[0] = rows - kept
            layouts.append(TableLayout(table.name, rows, table.embedding_dim, kind, tuple(rows_per_width), runs))
        return tuple(layouts)

    def _runs(self, t: int, rows: int) -> tuple[Run, ...]:
        first, last = self.run_offsets[t : t + 2].tolist()
        starts = self.run_starts[first:last].tolist()
        stops = [*starts[1:], rows]
        return tuple(
            Run.from_record((record[0], record[1]), start, stop - start)
            for record, start, stop in zip(self.run_records[first:last].tolist(), starts, stops, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def int32_tensor(values: Sequence[int]) -> Tensor:
    """Small numbers as the lookup takes them, int32 [n] on the CPU."""
    return torch.tensor(values, dtype=torch.int32)
