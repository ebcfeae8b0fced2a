"""Which directory a table gets."""

from collections.abc import Mapping

from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.layout import CollectionLayout, TableLayout, lay_out_coded_table, lay_out_table
from torchrec_mpe.packing.table_coding import TableCoding
from torchrec_mpe.packing.wavelet_splits import choose_splits

DIRECTORY_CHOICES = ("auto", "ranked", "remap", "nibble", "bitmap", "wavelet")
"""What a caller can ask for. "bitmap" is BITMAP if the kept rows have one width, else BITMAP_NIBBLE. Coded tables have
"ranked", "remap" or "wavelet" directories, others all but "wavelet"."""

_MAX_UNITS = 2**32 - 1  # a nibble line's base is a u32


def feasible_directories(widths: TableBitWidths) -> tuple[Directory, ...]:
    """The directory kinds that can store a table of these widths, the simplest first."""
    rows = widths.rows_per_width()
    nonzero = [bits for bits, count in enumerate(rows) if bits and count]
    kinds: list[Directory] = []
    # Rows that are all of one width need no order: ids are then as good as places.
    if widths.order is None or len(set(widths.bits)) == 1:
        kinds.append(Directory.RANKED)
    if widths.order is not None:
        kinds.append(Directory.REMAP)
    fits = sum(bits * count for bits, count in enumerate(rows)) <= _MAX_UNITS
    if fits:
        kinds.append(Directory.NIBBLE)
    if len(nonzero) == 1:
        kinds.append(Directory.BITMAP)
    if fits and rows[0]:
        kinds.append(Directory.BITMAP_NIBBLE)
    return tuple(kinds)


def choose_directory(name: str, widths: TableBitWidths, directory: str = "auto") -> TableLayout:
    """The layout of a table; work is per run, never per row.

    Args:
        name (str): table.
        widths (TableBitWidths): the bit-width of every row.
        directory (str): one of :data:`DIRECTORY_CHOICES`; "auto" takes the kind with the fewest bytes, payload and
            alignment included, and of equal ones the simplest.

    Raises:
        ValueError: naming the table, if the choice is unknown or cannot store these widths.
    """
    if directory not in DIRECTORY_CHOICES:
        raise ValueError(f"table {name}: directory must be one of {', '.join(DIRECTORY_CHOICES)}, got {directory!r}")
    feasible = feasible_directories(widths)
    if directory == "auto":
        layouts = [lay_out_table(name, widths, kind) for kind in feasible]
        return min(layouts, key=lambda layout: (layout.total_bytes, layout.directory))
    kinds = {
        "ranked": (Directory.RANKED,),
        "remap": (Directory.REMAP,),
        "nibble": (Directory.NIBBLE,),
        "bitmap": (Directory.BITMAP, Directory.BITMAP_NIBBLE),
        "wavelet": (),
    }[directory]
    for kind in kinds:
        if kind in feasible:
            return lay_out_table(name, widths, kind)
    why = {
        "ranked": "its ids are not in frequency order",
        "remap": "its ids are in frequency order and need no remap",
        "nibble": "its row starts do not fit into 32 bits",
        "bitmap": "it has several bit-widths, and no rows of 0 bits or row starts that do not fit into 32 bits",
        "wavelet": "it is not transform-coded",
    }[directory]
    names = ", ".join(dict.fromkeys(kind.name.lower().removesuffix("_nibble") for kind in feasible))
    raise ValueError(f"table {name} cannot have a {directory} directory, {why}: choose auto or one of {names}")


def lay_out(
    tables: Mapping[str, TableBitWidths | TableCoding], directory: str | Mapping[str, str] = "auto"
) -> CollectionLayout:
    """Choose every table's directory and place every run; work is per run, never per row.

    Args:
        tables (Mapping[str, TableBitWidths | TableCoding]): table names, in the order of the collection, to widths or
            codings.
        directory (Union[str, Mapping[str, str]]): one of :data:`DIRECTORY_CHOICES` for all tables, or by table name;
            "auto" for those that are not named.

    Raises:
        ValueError: naming the table, if a choice is unknown or not feasible, or is for no table; or if a table has
            more rows than int32 places can count.
    """
    chosen = directory_by_table(list(tables), directory)
    return CollectionLayout(
        tuple(
            _directory_of_coded(name, widths, chosen[name])
            if isinstance(widths, TableCoding)
            else choose_directory(name, widths, chosen[name])
            for name, widths in tables.items()
        )
    )


def _directory_of_coded(name: str, coding: TableCoding, directory: str) -> TableLayout:
    """The layout of a coded table: ranked where its ids are in the frequency order, else the smallest."""
    kinds = [Directory.RANKED if coding.order is None else Directory.REMAP]
    if coding.order is not None and len(coding.groups) == 1:
        kinds.append(Directory.RANKED)
    elif coding.order is not None and choose_splits(coding.run_rows):
        kinds.append(Directory.WAVELET)
    chosen = [kind for kind in kinds if directory in ("auto", kind.name.lower())]
    if not chosen:
        raise ValueError(
            f"table {name} is transform-coded in {len(coding.groups)} groups with its ids "
            f"{'in' if coding.order is None else 'not in'} the frequency order: its directory is "
            f"{' or '.join(kind.name.lower() for kind in kinds)}, not {directory!r}"
        )
    return lay_out_coded_table(name, coding, chosen[-1])


def directory_by_table(tables: list[str], directory: str | Mapping[str, str]) -> dict[str, str]:
    """The choice for each table, "auto" where ``directory`` names none.

    Raises:
        ValueError: if a choice is for no table.
    """
    if isinstance(directory, str):
        return dict.fromkeys(tables, directory)
    unknown = sorted(set(directory) - set(tables))
    if unknown:
        raise ValueError(f"a directory is chosen for {', '.join(unknown)}; the tables are {', '.join(tables)}")
    return {name: directory.get(name, "auto") for name in tables}
