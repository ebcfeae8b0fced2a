"""Checks that packed tables from a file cannot send a lookup outside their buffers."""

from collections.abc import Sequence

import torch

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.ops.reference.run_coding import (
    COMPONENT_BLOCKS,
    MAX_COMPONENTS,
    TRANSFORMED,
    block_bits,
    component_bits,
    level_count,
)
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.declared_layouts import declared_layouts
from torchrec_mpe.packing.layout import ALIGNMENT, CODED_ALIGNMENT, END_PADDING, TableLayout, run_alignment
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.validate_directory import validate_directory


def validate_packed_tables(packed: PackedTables, rows_per_width: Sequence[Sequence[int]] | None = None) -> None:
    """Check every tensor, offset, run record and directory against the format.

    Work is per run, and a few MiB at a time per row of a remap or a line.

    Args:
        packed (PackedTables): on any device but meta.
        rows_per_width (Optional[Sequence[Sequence[int]]]): rows of each bit-width, 9 numbers a table, to leave remaps
            and lines unread but for each bitmap's last line. Then only tables and runs are certain to lie in the
            weights; the CPU kernels check where a remap or a line leads before they follow it, Triton's do not.

    Raises:
        ValueError: one sentence naming the table or tensor.
    """
    _check_tensors(packed)
    _check_rows_and_kinds(packed)
    _check_coded_tables(packed)
    _check_runs_of_tables(packed)
    weights_ends = _check_weights_offsets(packed)
    directory_ends = _check_directory_offsets(packed)
    offsets = packed.directory_offsets.tolist()
    layouts = packed.layouts() if rows_per_width is None else declared_layouts(packed, rows_per_width)
    for t, layout in enumerate(layouts):
        part = packed.directory[max(offsets[t], 0) : directory_ends[t]]
        # How many rows a bitmap keeps, and so the bytes of nibbles after it, is known only from its last line.
        if layout.bitmap_bytes and not 0 <= layout.kept_rows <= layout.num_embeddings:
            raise ValueError(f"table {layout.name}: its bitmap keeps {layout.kept_rows} of its rows")
        if part.numel() < layout.directory_bytes:
            raise ValueError(
                f"table {layout.name}: its directory has {part.numel()} bytes, its rows need {layout.directory_bytes}"
            )
        if rows_per_width is None:
            validate_directory(layout, part)
        room = weights_ends[t] - int(packed.weights_offsets[t])
        _check_runs(layout, room)
        if layout.end > room:
            raise ValueError(f"table {layout.name}: its rows take {layout.end} bytes of the weights, it has {room}")
        _check_zero_row(packed, t)
        if layout.components is None:
            _check_scales(packed, t, layout)
        else:
            _check_levels(packed, t, layout)


def _check_tensors(packed: PackedTables) -> None:
    tables, runs, sets = len(packed.tables), packed.run_starts.numel(), packed.beta_offsets.numel()
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weights": (torch.uint8, (packed.weights.numel(),)),
        "weights_offsets": (torch.int64, (tables,)),
        "rows_per_table": (torch.int32, (tables,)),
        "run_records": (torch.int64, (runs, 2)),
        "run_starts": (torch.int32, (runs,)),
        "run_offsets": (torch.int32, (tables + 1,)),
        "directory_kinds": (torch.int32, (tables,)),
        "directory": (torch.uint8, (packed.directory.numel(),)),
        "directory_offsets": (torch.int64, (tables,)),
        "alpha": (torch.float32, (sets, MAX_BITS + 1)),
        "beta": (torch.float32, (packed.beta.numel(),)),
        "beta_offsets": (torch.int32, (sets,)),
        "scale_index": (torch.int32, (tables,)),
        "zero_rows": (torch.float32, (packed.zero_rows.numel(),)),
        "zero_row_offsets": (torch.int32, (tables,)),
        "levels": (torch.bfloat16, (packed.levels.numel(),)),
        "levels_offsets": (torch.int32, (tables,)),
        "bases": (torch.float16, (packed.bases.numel(),)),
        "bases_offsets": (torch.int32, (tables,)),
        "components": (torch.int32, (tables,)),
    }
    for name, tensor in packed.tensors().items():
        dtype, shape = expected[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite")
    if packed.weights.numel() < END_PADDING:
        raise ValueError(f"weights must end with {END_PADDING} bytes of padding, it has {packed.weights.numel()} bytes")
    if packed.directory.numel() % ALIGNMENT:
        raise ValueError(f"directory must be a multiple of {ALIGNMENT} bytes, it has {packed.directory.numel()}")


def _check_rows_and_kinds(packed: PackedTables) -> None:
    rows, kinds = packed.rows_per_table.tolist(), packed.directory_kinds.tolist()
    for t, table in enumerate(packed.tables):
        if rows[t] != table.num_embeddings:
            raise ValueError(f"table {table.name}: rows_per_table says {rows[t]} rows, not {table.num_embeddings}")
        if rows[t] < 1 or table.embedding_dim < 1:
            raise ValueError(f"table {table.name}: {rows[t]} rows of {table.embedding_dim} elements are no table")
        if kinds[t] not in list(Directory):
            raise ValueError(f"table {table.name}: there is no directory kind {kinds[t]}")


def _check_runs_of_tables(packed: PackedTables) -> None:
    offsets, kinds = packed.run_offsets.tolist(), packed.directory_kinds.tolist()
    if offsets[0] != 0 or offsets[-1] != packed.run_starts.numel():
        raise ValueError(f"run_offsets must go from 0 to {packed.run_starts.numel()}")
    for t, table in enumerate(packed.tables):
        # Bounded on both sides before any slice is taken: a dip must not hide between two legal ends.
        if not 0 <= offsets[t] <= offsets[t + 1] <= offsets[-1]:
            raise ValueError(f"table {table.name}: run_offsets must not fall, got {offsets[t]} and {offsets[t + 1]}")
        kind, runs = Directory(kinds[t]), offsets[t + 1] - offsets[t]
        if kind in (Directory.NIBBLE, Directory.BITMAP_NIBBLE):
            fits, wanted = runs == 0, "no runs"
        elif kind == Directory.BITMAP:
            fits, wanted = runs == 1, "one run"
        else:
            fits, wanted = runs > 0, "at least one run"
        if not fits:
            raise ValueError(f"table {table.name}: a {kind.name} directory has {wanted}, not {runs}")
        coded = packed.components_of(t) is not None
        if kind not in (Directory.RANKED, Directory.REMAP) and coded != (kind == Directory.WAVELET):
            what = "a coded table" if coded else "a table that is not coded"
            raise ValueError(f"table {table.name}: {what} cannot have a {kind.name} directory")
        for coding in (packed.run_records[offsets[t] : offsets[t + 1], 1] >> 32 & 0xFFFFFFFF).tolist():
            widths = list(block_bits(coding)) if coded and coding & TRANSFORMED else [coding]
            rest = (coding & ~TRANSFORMED) >> 4 * len(COMPONENT_BLOCKS) if len(widths) > 1 else 0
            if rest or not all(0 <= bits <= MAX_BITS for bits in widths):
                raise ValueError(
                    f"table {table.name}: run_records must have bit-widths between 0 and {MAX_BITS}, got {widths}"
                )


def _check_weights_offsets(packed: PackedTables) -> list[int]:
    """Check where tables start; returns the byte before which each table's rows must end."""
    offsets = packed.weights_offsets.tolist()
    ends = [*offsets[1:], packed.weights.numel() - END_PADDING]
    for table, offset, end, basis in zip(packed.tables, offsets, ends, packed.bases_offsets.tolist(), strict=False):
        alignment = ALIGNMENT if basis < 0 else CODED_ALIGNMENT
        if offset % alignment or not 0 <= offset <= end:
            raise ValueError(
                f"table {table.name}: it starts at byte {offset} of the weights, which must be a multiple of "
                f"{alignment}, after the tables before it and not beyond {end}"
            )
    return ends


def _check_directory_offsets(packed: PackedTables) -> list[int]:
    """Check where tables' parts start and that bitmaps lie inside; returns the byte where each part ends."""
    offsets, kinds = packed.directory_offsets.tolist(), packed.directory_kinds.tolist()
    following = [offset for offset in offsets if offset >= 0] + [packed.directory.numel()]
    if following[0] != 0:
        raise ValueError(f"directory must start with the first table's part, not at byte {following[0]}")
    ends: list[int] = []
    part = 0
    for table, offset, kind in zip(packed.tables, offsets, kinds, strict=True):
        if (offset == -1) != (kind == Directory.RANKED) or offset < -1:
            raise ValueError(f"table {table.name}: {Directory(kind).name} does not go with directory offset {offset}")
        if offset == -1:
            ends.append(0)
            continue
        end = following[part + 1]
        part += 1
        bitmap = kind in (Directory.BITMAP, Directory.BITMAP_NIBBLE)
        # What reading a layout needs; the rest is checked against the layout.
        least = -(-table.num_embeddings // BITMAP_ROWS) * LINE_BYTES if bitmap else 0
        least = LINE_BYTES if kind == Directory.WAVELET else least
        if offset % ALIGNMENT or not offset + least <= end <= packed.directory.numel():
            raise ValueError(
                f"table {table.name}: its directory lies at bytes {offset} to {end}, which must be {ALIGNMENT}-byte "
                f"aligned, at least {least} bytes and within {packed.directory.numel()}"
            )
        ends.append(end)
    return ends


def _check_runs(layout: TableLayout, room: int) -> None:
    """Check the runs of a table that has ``room`` bytes."""
    name = layout.name
    rows = layout.kept_rows if layout.directory == Directory.BITMAP else layout.num_embeddings
    if layout.runs and layout.runs[0].first != 0:
        raise ValueError(f"table {name}: the first run must start at rank 0, not {layout.runs[0].first}")
    end = 0
    for run in layout.runs:
        if run.rows < 1:
            raise ValueError(f"table {name}: run starts must increase and stay below {rows}")
        if run.bits == 0 and layout.directory == Directory.BITMAP:
            raise ValueError(f"table {name}: the rows that a bitmap keeps must have more than 0 bits")
        if run.is_transformed:
            assert layout.components is not None
            size, alignment = sum(component_bits(run.coding, layout.components)), 1
        else:
            size = 8 * row_bytes(layout.embedding_dim, run.bits)
            alignment = 8 * (ALIGNMENT if layout.components is None else run_alignment(size // 8))
        if run.row_bits != size:
            raise ValueError(
                f"table {name}: rows of {layout.embedding_dim} elements of coding {run.coding:#x} take {size} bits, "
                f"the run at rank {run.first} says {run.row_bits}"
            )
        if size == 0:
            if run.base != 0:
                raise ValueError(f"table {name}: the 0-bit run at rank {run.first} must have no rows in the weights")
            continue
        if run.base % alignment or run.base < end or run.end > room:
            raise ValueError(
                f"table {name}: the run at rank {run.first} lies at bits {run.base} to {run.base + run.rows * size}, "
                f"which must be a multiple of {alignment}, after bit {end} and within {room} bytes"
            )
        end = run.base + run.rows * size


def _check_coded_tables(packed: PackedTables) -> None:
    """Check which tables are coded, and that their bases lie in the buffer."""
    parts = zip(packed.components.tolist(), packed.bases_offsets.tolist(), packed.levels_offsets.tolist(), strict=True)
    scale_index = packed.scale_index.tolist()
    for t, (table, (components, basis, levels)) in enumerate(zip(packed.tables, parts, strict=True)):
        coded = basis >= 0
        if coded != (scale_index[t] == -1) or coded != (levels >= 0) or min(basis, levels) < -1:
            raise ValueError(
                f"table {table.name}: basis offset {basis}, levels offset {levels} and scale_index {scale_index[t]} "
                "are neither those of a coded table nor of another"
            )
        if not 0 <= components <= (MAX_COMPONENTS if coded else 0):
            raise ValueError(f"table {table.name}: it cannot have {components} components")
        size = (components + 1) * table.embedding_dim
        if coded and basis + size > packed.bases.numel():
            raise ValueError(
                f"table {table.name}: basis offset {basis} leaves its buffer of {packed.bases.numel()} with {size}"
            )


def _check_levels(packed: PackedTables, t: int, layout: TableLayout) -> None:
    """Check that the levels of a coded table lie in the buffer, and its step sizes are positive."""
    assert layout.components is not None
    start = int(packed.levels_offsets[t])
    levels = packed.levels[start : start + layout.levels].tolist()
    if len(levels) != layout.levels:
        raise ValueError(
            f"table {layout.name}: levels offset {start} leaves its buffer of {packed.levels.numel()} with "
            f"{layout.levels}"
        )
    following = 0
    for run in layout.runs:
        if not run.is_transformed and run.bits and levels[following] <= 0:
            raise ValueError(
                f"table {layout.name}: the step size of the run at rank {run.first} must be positive, it is "
                f"{levels[following]}"
            )
        following += level_count(run.coding, layout.components)


def _check_zero_row(packed: PackedTables, t: int) -> None:
    zero, dim = int(packed.zero_row_offsets[t]), packed.tables[t].embedding_dim
    if zero != -1 and not 0 <= zero <= packed.zero_rows.numel() - dim:
        raise ValueError(
            f"table {packed.tables[t].name}: zero row offset {zero} leaves its buffer of {packed.zero_rows.numel()}"
        )


def _check_scales(packed: PackedTables, t: int, layout: TableLayout) -> None:
    name, dim = layout.name, layout.embedding_dim
    index = int(packed.scale_index[t])
    if not 0 <= index < packed.alpha.shape[0]:
        raise ValueError(f"table {name}: scale_index {index} is not below {packed.alpha.shape[0]}")
    offset = int(packed.beta_offsets[index])
    if not 0 <= offset <= packed.beta.numel() - dim:
        raise ValueError(f"table {name}: beta offset {offset} leaves its buffer of {packed.beta.numel()}")
    alpha = packed.alpha[index].tolist()
    in_use = [bits for bits, rows in enumerate(layout.rows_per_width) if bits and rows]
    if alpha[0] != 0.0 or any(alpha[bits] <= 0.0 for bits in in_use):
        raise ValueError(f"table {name}: step sizes must be 0 for 0 bits and positive for the widths in use: {alpha}")
