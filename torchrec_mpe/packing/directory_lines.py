"""The lines and remaps of packed tables' directories, written and read a few MiB at a time."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, NIBBLE_ROWS, Directory
from torchrec_mpe.packing.bit_widths import MAX_BITS, TableBitWidths
from torchrec_mpe.packing.layout import TableLayout, stored_rank_shifts

_CHUNK_ROWS = 1 << 20


def row_bits(widths: TableBitWidths, start: int, stop: int) -> Tensor:
    """The bit-width of rows ``start`` to ``stop - 1``, uint8 [stop - start], on the CPU."""
    order = torch.arange(start, stop) if widths.order is None else widths.order[start:stop].cpu()
    bounds = torch.tensor(widths.bounds[1:], dtype=order.dtype)
    return torch.tensor(widths.bits, dtype=torch.uint8)[torch.searchsorted(bounds, order, right=True)]


def write_directory(widths: TableBitWidths, layout: TableLayout, out: Tensor) -> None:
    """Write a table's remap or lines to ``out``, zeros of ``layout.directory_bytes``."""
    if layout.directory == Directory.REMAP:
        assert widths.order is not None
        _write_remap(widths, widths.order, out.view(torch.int32))
    if layout.directory in (Directory.BITMAP, Directory.BITMAP_NIBBLE):
        write_bitmap(_chunks_of_bits(widths), out[: layout.bitmap_bytes].view(-1, LINE_BYTES))
    if layout.directory == Directory.NIBBLE:
        _write_nibbles(_chunks_of_bits(widths), out.view(-1, LINE_BYTES))
    if layout.directory == Directory.BITMAP_NIBBLE:
        kept = (bits[bits > 0] for bits in _chunks_of_bits(widths))
        _write_nibbles(kept, out[layout.bitmap_bytes :].view(-1, LINE_BYTES))


def _chunks_of_bits(widths: TableBitWidths) -> Iterator[Tensor]:
    rows = widths.num_embeddings
    return (row_bits(widths, start, min(start + _CHUNK_ROWS, rows)) for start in range(0, rows, _CHUNK_ROWS))


def _in_lines(chunks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The bits of whole lines, [lines, rows] at a time, zeros after the last row."""
    rest = torch.empty(0, dtype=torch.uint8)
    for chunk in chunks:
        rest = torch.cat([rest, chunk])
        whole = rest.numel() // rows * rows
        if whole:
            yield rest[:whole].view(-1, rows)
        rest = rest[whole:]
    if rest.numel():
        yield torch.nn.functional.pad(rest, (0, rows - rest.numel())).view(1, rows)


def _write_remap(widths: TableBitWidths, order: Tensor, out: Tensor) -> None:
    """The stored rank of every row: its place in the frequency order plus the shift of its segment."""
    bounds = torch.tensor(widths.bounds[1:], dtype=torch.int32)
    shifts = torch.tensor(stored_rank_shifts(widths), dtype=torch.int32)
    for start in range(0, order.numel(), _CHUNK_ROWS):
        chunk = order[start : start + _CHUNK_ROWS].cpu()
        out[start : start + chunk.numel()] = chunk + shifts[torch.searchsorted(bounds, chunk, right=True)]


def _write_nibbles(chunks: Iterable[Tensor], lines: Tensor) -> None:
    line, base = 0, 0
    for bits in _in_lines(chunks, NIBBLE_ROWS):
        ends = base + bits.sum(1, dtype=torch.int64).cumsum(0)
        bases = torch.cat([torch.tensor([base]), ends[:-1]])
        target = lines[line : line + len(bits)]
        target[:, :4] = bases.view(torch.uint8).view(-1, 8)[:, :4]
        target[:, 4:] = bits[:, ::2] | bits[:, 1::2] << 4
        line, base = line + len(bits), int(ends[-1])


def write_bitmap(chunks: Iterable[Tensor], lines: Tensor) -> None:
    """Write lines in which the bits of rows are set that are not 0 in ``chunks``, uint8."""
    line, rank = 0, 0
    place = torch.arange(8, dtype=torch.uint8)
    for bits in _in_lines(chunks, BITMAP_ROWS):
        kept = (bits > 0).to(torch.uint8)
        ends = rank + kept.sum(1, dtype=torch.int64).cumsum(0)
        ranks = torch.cat([torch.tensor([rank]), ends[:-1]])
        target = lines[line : line + len(bits)]
        target[:, :8] = ranks.view(torch.uint8).view(-1, 8)
        target[:, 8:] = (kept.view(len(bits), -1, 8) << place).sum(2, dtype=torch.uint8)
        line, rank = line + len(bits), int(ends[-1])


def kept_rows(lines: Tensor, rows: int) -> int:
    """Rows that the bitmap of a table's ``rows`` rows keeps, by its last line.

    Args:
        lines (Tensor): uint8, at least the table's bitmap lines.
        rows (int): rows of the table.
    """
    last = (-(-rows // BITMAP_ROWS) - 1) * LINE_BYTES
    line = lines[last : last + LINE_BYTES].cpu().clone()
    return int(line[:8].view(torch.int64)) + int(set_bits(line[8:]).sum())


def set_bits(values: Tensor) -> Tensor:
    """The number of set bits of each byte, uint8."""
    counts = torch.zeros_like(values)
    for place in range(8):
        counts += values >> place & 1
    return counts


def count_widths(lines: Tensor, rows: int) -> list[int]:
    """Rows of each bit-width in nibble lines of ``rows`` rows, 9 numbers.

    Args:
        lines (Tensor): uint8, at least the lines of these rows.
        rows (int): rows that the lines cover.
    """
    end = min(-(-rows // NIBBLE_ROWS) * LINE_BYTES, lines.numel())
    counts = torch.zeros(16, dtype=torch.int64, device=lines.device)
    for start in range(0, end, _CHUNK_ROWS):
        widths = lines[start : min(start + _CHUNK_ROWS, end)].view(-1, LINE_BYTES)[:, 4:].flatten()
        counts += torch.bincount(widths & 15, minlength=16) + torch.bincount(widths >> 4, minlength=16)
    counts[0] -= end // LINE_BYTES * NIBBLE_ROWS - rows  # unused positions are zero
    return counts[: MAX_BITS + 1].tolist()
