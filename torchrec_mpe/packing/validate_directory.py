"""Checks that the lines and remaps of packed tables lead to rows that are there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, NIBBLE_ROWS, Directory
from torchrec_mpe.ops.reference.wavelet_ranks import Split
from torchrec_mpe.packing.bit_widths import MAX_BITS
from torchrec_mpe.packing.directory_lines import set_bits
from torchrec_mpe.packing.layout import TableLayout
from torchrec_mpe.packing.order_segments import is_permutation
from torchrec_mpe.packing.wavelet_splits import bitmap_bytes, remap_bytes

_CHUNK_LINES = 1 << 14


def validate_directory(layout: TableLayout, part: Tensor) -> None:
    """Check a table's part of the directory against the table's layout; work is per row, a few MiB at a time.

    Args:
        layout (TableLayout): read from the same tensors.
        part (Tensor): uint8, from the table's first byte to the next table's, at least ``layout.directory_bytes``.

    Raises:
        ValueError: naming the table and the line.
    """
    name = layout.name
    lines, rest = part[: layout.directory_bytes], part[layout.directory_bytes :]
    if bool(rest.any()):
        raise ValueError(f"table {name}: the directory's alignment must be zero")
    if layout.directory == Directory.REMAP:
        remap = lines.view(torch.int32)
        if not is_permutation(remap):
            raise ValueError(f"table {name}: remap must be a permutation of its {remap.numel()} rows")
    if layout.directory in (Directory.BITMAP, Directory.BITMAP_NIBBLE):
        _check_bitmap(lines[: layout.bitmap_bytes].view(-1, LINE_BYTES), layout.num_embeddings, name)
    if layout.directory == Directory.WAVELET:
        _check_wavelet(lines, layout.splits, name)
    if layout.directory == Directory.NIBBLE:
        _check_nibbles(lines.view(-1, LINE_BYTES), layout.num_embeddings, 0, name)
    if layout.directory == Directory.BITMAP_NIBBLE:
        _check_nibbles(lines[layout.bitmap_bytes :].view(-1, LINE_BYTES), layout.kept_rows, 1, name)


def _check_bitmap(lines: Tensor, rows: int, name: str) -> int:
    """Check a bitmap's lines; returns the number of set bits."""
    rank = 0
    for start in range(0, len(lines), _CHUNK_LINES):
        chunk = lines[start : start + _CHUNK_LINES]
        ends = rank + set_bits(chunk[:, 8:]).sum(1, dtype=torch.int64).cumsum(0)
        ranks = chunk[:, :8].contiguous().view(torch.int64).squeeze(1)
        _check_line_starts(ranks, ends, rank, start, name, "rank")
        rank = int(ends[-1])
    used = rows - (len(lines) - 1) * BITMAP_ROWS
    last = lines[-1, 8:]
    unused = (last.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=last.device) & 1).flatten()[used:]
    if bool(unused.any()):
        raise ValueError(f"table {name}: the bitmap has bits after row {rows - 1}")
    return rank


def _check_wavelet(lines: Tensor, splits: Sequence[Split], name: str) -> None:
    """Check the bitmaps and ranks of splits that follow from each other."""
    records = lines[: splits[0].line * LINE_BYTES].view(torch.int32)
    unused = torch.cat([records[: 8 * len(splits)].view(-1, 8)[1:, 6:].flatten(), records[8 * len(splits) :]])
    if bool(unused.any()):
        raise ValueError(f"table {name}: what splits of its directory do not use must be zero")
    of_lines = lines.view(-1, LINE_BYTES)
    for k, split in enumerate(splits):
        bitmap = of_lines[split.line : split.line + bitmap_bytes(split.rows) // LINE_BYTES]
        kept = _check_bitmap(bitmap, split.rows, name)
        if kept != split.kept:
            raise ValueError(f"table {name}: split {k} of its directory keeps {kept} rows, not {split.kept}")
        for first, rows, there in split.halves:
            if there < 0:
                words = of_lines[-there : -there + remap_bytes(rows) // LINE_BYTES].flatten().view(torch.int32)
                if not is_permutation(words[:rows] - first) or bool(words[rows:].any()):
                    raise ValueError(f"table {name}: the ranks from {first} on must be {rows} in its directory")


def _check_nibbles(lines: Tensor, rows: int, low: int, name: str) -> None:
    """Widths of ``rows`` rows must lie between ``low`` and 8; what follows them must be zero."""
    base = 0
    for start in range(0, len(lines), _CHUNK_LINES):
        chunk = lines[start : start + _CHUNK_LINES]
        widths = torch.stack([chunk[:, 4:] & 15, chunk[:, 4:] >> 4], dim=2).flatten(1)
        used = widths.flatten()[: rows - start * NIBBLE_ROWS]
        if int(used.max()) > MAX_BITS or int(used.min()) < low:
            row = start * NIBBLE_ROWS + int(((used > MAX_BITS) | (used < low)).nonzero()[0])
            raise ValueError(
                f"table {name}: the width of stored row {row} is {int(used[row - start * NIBBLE_ROWS])}, "
                f"it must lie between {low} and {MAX_BITS}"
            )
        if bool(widths.flatten()[used.numel() :].any()):
            raise ValueError(f"table {name}: the nibble directory has widths after row {rows - 1}")
        ends = base + widths.sum(1, dtype=torch.int64).cumsum(0)
        bases = chunk[:, :4].contiguous().view(torch.int32).squeeze(1).long() & 0xFFFFFFFF
        _check_line_starts(bases, ends, base, start, name, "base")
        base = int(ends[-1])


def _check_line_starts(found: Tensor, ends: Tensor, first: int, line: int, name: str, what: str) -> None:
    """What each line starts at must be where the line before it ends."""
    expected = torch.cat([ends.new_tensor([first]), ends[:-1]])
    wrong = (found != expected).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(
            f"table {name}: line {line + at} of its directory has {what} {int(found[at])}, "
            f"the rows before it make {int(expected[at])}"
        )
