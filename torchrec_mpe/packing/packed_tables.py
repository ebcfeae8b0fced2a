"""The tensors of a collection of packed tables."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.ops.reference.locate import Located, locate
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.directory_lines import count_widths, kept_rows
from torchrec_mpe.packing.layout import Run, TableLayout
from torchrec_mpe.packing.wavelet_splits import splits_of_table


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
    table's directory, :class:`torchrec_mpe.ops.directory.Directory`. All but NIBBLE and BITMAP_NIBBLE end
    in a rank::

        rank = id (RANKED), its int32 in the directory (REMAP), its kept rank (BITMAP; a cleared bit: 0 bits), or where
               a tree of bitmaps leads (WAVELET)
        run  = last k in [run_offsets[t], run_offsets[t + 1]) with run_starts[k] <= rank
        {offset, row_bits, coding} = run_records[run]
        row  = the row_bits bits from bit offset + rank * row_bits of the table on, which starts at weights_offsets[t]

    and NIBBLE and BITMAP_NIBBLE in a row start and width of their own. The coding of a plain row is its bit-width::

        bits > 0:  element d = (code - 2**(bits - 1)) * alpha[s, bits] + beta[beta_offsets[s] + d],  s = scale_index[t]
        bits = 0:  element d = zero_rows[zero_row_offsets[t] + d], or 0 if the offset is -1

    In a coded table the step size of a run of plain rows is one of its levels, and beta is the mean. Rows may also be
    transformed; each component of more than 0 bits then has two levels, scale and offset::

        plain:        element d = (code - 2**(bits - 1)) * step + basis[K, d]
        transformed:  element d = sum_k (scale[k] * code_k + offset[k]) * basis[k, d] + basis[K, d]

    Attributes:
        tables (tuple[TableShape, ...]): names and logical shapes.
        weights (Tensor): uint8 [P], packed rows; tables and runs 64-byte aligned, 64 bytes of padding at the end.
        weights_offsets (Tensor): int64 [T], the byte where each table starts, multiples of 64.
        rows_per_table (Tensor): int32 [T].
        run_records (Tensor): int64 [R, 2], 16 bytes a run {int64 base - first*row_bits, u32 row_bits, u32 coding},
            base counted in bits from the table's first byte; all zeros for a run of 0 bits. See
            :mod:`torchrec_mpe.ops.reference.run_coding` for codings.
        run_starts (Tensor): int32 [R], the rank of each run's first row; 0 for the first run of a table.
        run_offsets (Tensor): int32 [T + 1], the runs of each table; none with NIBBLE and BITMAP_NIBBLE.
        directory_kinds (Tensor): int32 [T], values of Directory.
        directory (Tensor): uint8 [Q], the remaps and lines of the tables, each table's 64-byte aligned, in order.
        directory_offsets (Tensor): int64 [T], the byte where each table's part of ``directory`` starts; -1: RANKED.
        alpha (Tensor): float32 [S, 9], step size of each bit-width for each of S scale sets; alpha[:, 0] = 0.
        beta (Tensor): float32, the offsets of the S scale sets one after another, D floats each.
        beta_offsets (Tensor): int32 [S], where each scale set's offset starts in ``beta``.
        scale_index (Tensor): int32 [T], the scale set of each table; -1: the table is coded.
        zero_rows (Tensor): float32, what 0-bit rows read, D floats for each table that has one.
        zero_row_offsets (Tensor): int32 [T], where each table's vector starts in ``zero_rows``; -1: zeros.
        levels (Tensor): bfloat16, of the coded tables' runs in order: the step size of plain rows of more than 0 bits;
            scale and offset in turn of each component of more than 0 bits of transformed rows.
        levels_offsets (Tensor): int32 [T], where each coded table's levels start; -1: the table is not coded.
        bases (Tensor): float16, of each coded table K + 1 rows of D: of the components, and the mean.
        bases_offsets (Tensor): int32 [T], where each coded table's basis starts in ``bases``; -1: it is not coded.
        components (Tensor): int32 [T], K of each coded table, 0 to 16; 0 if it is not coded.
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
    levels: Tensor
    levels_offsets: Tensor
    bases: Tensor
    bases_offsets: Tensor
    components: Tensor

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
                runs = self.runs(t, kept)
                for run in runs:
                    if not run.is_transformed:
                        rows_per_width[run.bits] += run.rows
            if has_bitmap:
                rows_per_width[0] = rows - kept
            shape = (table.name, rows, table.embedding_dim)
            splits = splits_of_table(lines, rows, table.name) if kind == Directory.WAVELET else ()
            layouts.append(TableLayout(*shape, kind, tuple(rows_per_width), runs, self.components_of(t), splits))
        return tuple(layouts)

    def components_of(self, t: int) -> int | None:
        """K of a table; None if it is not coded."""
        return int(self.components[t]) if int(self.bases_offsets[t]) >= 0 else None

    def basis(self, t: int) -> Tensor:
        """The basis of a coded table with the mean below, float16 [K + 1, D], a view."""
        start, dim = int(self.bases_offsets[t]), self.tables[t].embedding_dim
        rows = int(self.components[t]) + 1
        return self.bases[start : start + rows * dim].view(rows, dim)

    def locate(self, t: int, ids: Tensor) -> Located:
        """Where rows of a table lie, counted in bits from the table's first byte; ids int64 [n], not checked."""
        runs = slice(int(self.run_offsets[t]), int(self.run_offsets[t + 1]))
        return locate(
            ids,
            Directory(int(self.directory_kinds[t])),
            self.directory[max(int(self.directory_offsets[t]), 0) :],
            self.tables[t].num_embeddings,
            row_bytes(self.tables[t].embedding_dim, 1),
            self.run_records[runs],
            self.run_starts[runs],
        )

    def runs(self, t: int, rows: int) -> tuple[Run, ...]:
        """The runs of a table whose runs hold ``rows`` rows."""
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
