"""From ids to the bytes and widths of their rows, in pure PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, NIBBLE_ROWS, Directory
from torchrec_mpe.ops.reference.wavelet_ranks import bits_and_ranks, wavelet_ranks


class Located(NamedTuple):
    """Where rows of a table lie.

    Attributes:
        starts (Tensor): int64 [n], the bit where each row starts, counted from the table's first byte.
        coding (Tensor): int64 [n], of its run's record: the bit-width of a plain row.
        runs (Tensor): int64 [n], its run among those of the table; 0 where there are none.
    """

    starts: Tensor
    coding: Tensor
    runs: Tensor


def locate(
    ids: Tensor,
    kind: Directory,
    directory: Tensor,
    rows: int,
    unit: int,
    run_records: Tensor,
    run_starts: Tensor,
) -> Located:
    """Where the rows of one table lie and how they are coded.

    Args:
        ids (Tensor): int64 [n], each in [0, rows).
        kind (Directory): of the table.
        directory (Tensor): uint8, from the first byte of the table's part on.
        rows (int): rows of the table.
        unit (int): ceil(D / 8), the bytes that one bit of width adds to a row.
        run_records (Tensor): int64 [runs, 2], of the table.
        run_starts (Tensor): int32 [runs], of the table.

    Returns:
        Located: the bit of a row without bits has no meaning.
    """
    if kind == Directory.RANKED:
        return _in_runs(ids, run_records, run_starts)
    if kind == Directory.REMAP:
        remap = directory[: 4 * rows].view(torch.int32)
        return _in_runs(remap[ids].long(), run_records, run_starts)
    if kind == Directory.WAVELET:
        return _in_runs(wavelet_ranks(ids, directory), run_records, run_starts)
    if kind == Directory.NIBBLE:
        return _in_nibble_lines(ids, directory, rows, unit)
    kept, ranks = bits_and_ranks(_lines(directory, rows, BITMAP_ROWS), ids)
    located = Located(*(torch.zeros_like(ids) for _ in range(3)))
    if kind == Directory.BITMAP:
        found = _in_runs(ranks[kept], run_records, run_starts)
    else:
        nibbles = directory[-(-rows // BITMAP_ROWS) * LINE_BYTES :]
        found = _in_nibble_lines(ranks[kept], nibbles, rows, unit)
    for values, of_kept in zip(located, found, strict=True):
        values[kept] = of_kept
    return located


def _in_runs(ranks: Tensor, run_records: Tensor, run_starts: Tensor) -> Located:
    run = torch.searchsorted(run_starts.long(), ranks, right=True) - 1
    row_bits, coding = run_records[run, 1] & 0xFFFFFFFF, run_records[run, 1] >> 32 & 0xFFFFFFFF
    return Located(run_records[run, 0] + ranks * row_bits, coding, run)


def _in_nibble_lines(ranks: Tensor, directory: Tensor, rows: int, unit: int) -> Located:
    lines = _lines(directory, rows, NIBBLE_ROWS)[ranks // NIBBLE_ROWS]
    position = (ranks % NIBBLE_ROWS).unsqueeze(1)
    base = lines[:, :4].contiguous().view(torch.int32).squeeze(1).long() & 0xFFFFFFFF
    widths = torch.stack([lines[:, 4:] & 15, lines[:, 4:] >> 4], dim=2).flatten(1)
    before = torch.arange(NIBBLE_ROWS, device=ranks.device) < position
    starts = base + (widths * before).sum(1)
    return Located(starts * unit * 8, widths.gather(1, position).squeeze(1).long(), torch.zeros_like(ranks))


def _lines(directory: Tensor, rows: int, rows_per_line: int) -> Tensor:
    """The lines, [at most ceil(rows / rows_per_line), 64]."""
    lines = directory.numel() // LINE_BYTES
    return directory[: min(lines, -(-rows // rows_per_line)) * LINE_BYTES].view(-1, LINE_BYTES)
