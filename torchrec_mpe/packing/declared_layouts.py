"""The layouts of packed tables whose lines nobody has read yet."""

from collections.abc import Sequence

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.directory_lines import kept_rows
from torchrec_mpe.packing.layout import Run, TableLayout
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.wavelet_splits import splits_of_table

_BITMAPS = (Directory.BITMAP, Directory.BITMAP_NIBBLE)
_WITHOUT_RUNS = (Directory.NIBBLE, Directory.BITMAP_NIBBLE)


def declared_layouts(packed: PackedTables, rows_per_width: Sequence[Sequence[int]]) -> tuple[TableLayout, ...]:
    """:meth:`PackedTables.layouts` with the widths of nibble lines as declared; work is per table and run.

    Args:
        packed (PackedTables): whose runs, offsets and kinds fit each other.
        rows_per_width (Sequence[Sequence[int]]): rows of each bit-width, 9 numbers a table.

    Raises:
        ValueError: naming the table, if the numbers do not add up to its rows, or are not those of its runs or of its
            bitmap's last line.
    """
    layouts: list[TableLayout] = []
    offsets = packed.directory_offsets.tolist()
    kinds = [Directory(kind) for kind in packed.directory_kinds.tolist()]
    for t, (table, kind, declared) in enumerate(zip(packed.tables, kinds, rows_per_width, strict=True)):
        rows = table.num_embeddings
        coded = packed.components_of(t) is not None
        wrong = sum(declared) > rows if coded else sum(declared) != rows
        if len(declared) != MAX_BITS + 1 or min(declared) < 0 or wrong:
            raise ValueError(f"table {table.name}: {list(declared)} rows of each bit-width are not its {rows} rows")
        kept = kept_rows(packed.directory[offsets[t] :], rows) if kind in _BITMAPS else rows
        found = [0] * (MAX_BITS + 1)
        runs: tuple[Run, ...] = ()
        if kind in _WITHOUT_RUNS:
            found[1:] = list(declared[1:])
            found[0] = declared[0] if kind == Directory.NIBBLE else rows - kept
        else:
            runs = packed.runs(t, kept)
            for run in runs:
                if not run.is_transformed:
                    found[run.bits] += run.rows
            found[0] += rows - kept
        if found != list(declared):
            raise ValueError(
                f"table {table.name}: it has {found} rows of each bit-width, other bit-widths than the declared "
                f"{list(declared)}"
            )
        shape = (table.name, rows, table.embedding_dim)
        is_wavelet = kind == Directory.WAVELET
        splits = splits_of_table(packed.directory[offsets[t] :], rows, table.name) if is_wavelet else ()
        layouts.append(TableLayout(*shape, kind, tuple(declared), runs, packed.components_of(t), splits))
    return tuple(layouts)
