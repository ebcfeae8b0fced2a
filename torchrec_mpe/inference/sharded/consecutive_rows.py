"""Where consecutive rows of a packed table lie: :func:`torchrec_mpe.ops.reference.locate.locate`, a line at a time."""

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, NIBBLE_ROWS, Directory
from torchrec_mpe.ops.reference.locate import locate


def locate_consecutive(
    start: int,
    stop: int,
    kind: Directory,
    directory: Tensor,
    rows: int,
    unit: int,
    run_records: Tensor,
    run_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Where the rows of ids ``start`` to ``stop - 1`` lie and how wide they are; reads each line once, not per row.

    Arguments and the two results are those of :func:`torchrec_mpe.ops.reference.locate.locate`: bits, and codings.
    """
    if kind in (Directory.RANKED, Directory.REMAP, Directory.WAVELET):
        ids = torch.arange(start, stop)
        located = locate(ids, kind, directory, rows, unit, run_records, run_starts)
        return located.starts, located.coding
    if kind == Directory.NIBBLE:
        return _in_nibble_lines(start, stop, directory, unit)
    bitmap_bytes = -(-rows // BITMAP_ROWS) * LINE_BYTES
    lines = directory[start // BITMAP_ROWS * LINE_BYTES : -(-stop // BITMAP_ROWS) * LINE_BYTES].view(-1, LINE_BYTES)
    set_bits = (lines[:, 8:].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    skipped = start % BITMAP_ROWS
    first_kept = int(lines[0, :8].clone().view(torch.int64)) + int(set_bits[:skipped].sum())
    kept = set_bits[skipped : skipped + stop - start].bool()
    starts, bits = torch.zeros(stop - start, dtype=torch.int64), torch.zeros(stop - start, dtype=torch.int64)
    last_kept = first_kept + int(kept.sum())
    if last_kept == first_kept:
        return starts, bits
    if kind == Directory.BITMAP:
        ranks = torch.arange(first_kept, last_kept)
        located = locate(ranks, Directory.RANKED, directory, rows, unit, run_records, run_starts)
        starts[kept], bits[kept] = located.starts, located.coding
    else:
        starts[kept], bits[kept] = _in_nibble_lines(first_kept, last_kept, directory[bitmap_bytes:], unit)
    return starts, bits


def _in_nibble_lines(start: int, stop: int, directory: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    lines = directory[start // NIBBLE_ROWS * LINE_BYTES : -(-stop // NIBBLE_ROWS) * LINE_BYTES].view(-1, LINE_BYTES)
    base = lines[:, :4].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    widths = torch.stack([lines[:, 4:] & 15, lines[:, 4:] >> 4], dim=2).flatten(1).long()
    starts = base + widths.cumsum(1) - widths
    own = slice(start % NIBBLE_ROWS, start % NIBBLE_ROWS + stop - start)
    return starts.flatten()[own] * unit * 8, widths.flatten()[own]
