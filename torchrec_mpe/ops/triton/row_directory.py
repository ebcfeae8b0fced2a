"""From row ids to the places and codings of packed rows, for every kind of directory."""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

from torchrec_mpe.ops.directory import BITMAP_ROWS, LINE_BYTES, NIBBLE_ROWS, SPLIT_BYTES, Directory

_REMAP = tl.constexpr(int(Directory.REMAP))
_NIBBLE = tl.constexpr(int(Directory.NIBBLE))
_BITMAP = tl.constexpr(int(Directory.BITMAP))
_BITMAP_NIBBLE = tl.constexpr(int(Directory.BITMAP_NIBBLE))
_WAVELET = tl.constexpr(int(Directory.WAVELET))
_SPLIT_WORDS = tl.constexpr(SPLIT_BYTES // 4)
_NIBBLE_ROWS = tl.constexpr(NIBBLE_ROWS)
_BITMAP_ROWS = tl.constexpr(BITMAP_ROWS)
_LINE_BYTES = tl.constexpr(LINE_BYTES)


@triton.jit
def _bits_before(line, end_bit, WORD: tl.constexpr, FIRST_BIT: tl.constexpr, mask):  # noqa: N803
    """A 64-bit word of each line, bits outside [FIRST_BIT, end_bit) of the line cleared."""
    ahead = end_bit - 64 * WORD
    bits = tl.load(line.to(tl.pointer_type(tl.uint64)) + WORD, mask=mask & (ahead > 0), other=0)
    below = (tl.cast(1, tl.uint64) << tl.minimum(tl.maximum(ahead, 0), 63).to(tl.uint64)) - 1
    bits = tl.where(ahead >= 64, bits, bits & below)
    if FIRST_BIT > 64 * WORD:
        bits = (bits >> (FIRST_BIT - 64 * WORD)) << (FIRST_BIT - 64 * WORD)
    return bits


@triton.jit
def _sum_of_bytes(counts):
    """The sum of the 8 bytes of each word, int32."""
    counts = (counts & 0x00FF00FF00FF00FF) + ((counts >> 8) & 0x00FF00FF00FF00FF)
    return ((counts * 0x0001000100010001) >> 48).to(tl.int32)


@triton.jit
def _bitmap_rank(lines, row, mask):
    """Whether each row's bit is set, and the set bits before it in its table."""
    line = lines + (row // _BITMAP_ROWS).to(tl.int64) * _LINE_BYTES
    place = row % _BITMAP_ROWS
    counts = tl.zeros_like(row).to(tl.uint64)  # per byte, over the line's words: at most 56
    for word in tl.static_range(1, 8):
        bits = _bits_before(line, 64 + place, word, 64, mask)
        bits = bits - ((bits >> 1) & 0x5555555555555555)
        bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
        counts += (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
    rank = tl.load(line.to(tl.pointer_type(tl.int64)), mask=mask, other=0).to(tl.int32)
    byte = tl.load(line + 8 + place // 8, mask=mask, other=0).to(tl.int32)
    return ((byte >> (place % 8)) & 1) != 0, rank + _sum_of_bytes(counts)


@triton.jit
def _wavelet_rank(lines, row, mask):
    """The stored rank of each row, level by level of the tree."""
    words = lines.to(tl.pointer_type(tl.int32))
    levels = tl.load(words + 7)
    split = tl.zeros_like(row)
    rank = tl.zeros_like(row)
    active = mask
    while levels > 0:
        of_split = words + split * _SPLIT_WORDS
        line = tl.load(of_split + 3, mask=active, other=0).to(tl.int64)
        is_set, kept = _bitmap_rank(lines + line * _LINE_BYTES, row, active)
        row = tl.where(active, tl.where(is_set, kept, row - kept), row)
        there = tl.load(of_split + tl.where(is_set, 4, 5), mask=active, other=0)
        first = tl.load(of_split, mask=active, other=0)
        first += tl.where(is_set, 0, tl.load(of_split + 2, mask=active, other=0))
        rank = tl.where(active & (there == 0), first + row, rank)
        in_ranks = active & (there < 0)
        place = -there.to(tl.int64) * (_LINE_BYTES // 4) + row
        rank = tl.where(in_ranks, tl.load(words + place, mask=in_ranks, other=0), rank)
        active = active & (there > 0)
        split = tl.where(active, there, 0)
        levels -= 1
    return rank


@triton.jit
def _nibble_row(lines, row, mask):
    """The first unit of each row in its table, int64, and the row's bit-width."""
    line = lines + (row // _NIBBLE_ROWS).to(tl.int64) * _LINE_BYTES
    place = row % _NIBBLE_ROWS
    counts = tl.zeros_like(row).to(tl.uint64)  # two widths per byte, over the line's words: at most 128
    for word in tl.static_range(8):
        widths = _bits_before(line, 32 + 4 * place, word, 32, mask)
        counts += (widths & 0x0F0F0F0F0F0F0F0F) + ((widths >> 4) & 0x0F0F0F0F0F0F0F0F)
    base = tl.load(line.to(tl.pointer_type(tl.uint32)), mask=mask, other=0).to(tl.int64)
    byte = tl.load(line + 4 + place // 2, mask=mask, other=0).to(tl.int32)
    return base + _sum_of_bytes(counts), (byte >> (4 * (place % 2))) & 15


@triton.jit
def _run_row(run_records, run_starts, run_offsets, table, rank, mask):
    """The first bit of each row in its table, int64, its coding and its run, by its rank."""
    first = tl.load(run_offsets + table)
    remaining = tl.load(run_offsets + table + 1) - first
    mask = mask & (remaining > 0)
    run = tl.zeros_like(rank) + first
    while remaining > 1:
        half = remaining // 2
        run = tl.where(tl.load(run_starts + run + half) <= rank, run + half, run)
        remaining -= half
    base = tl.load(run_records + 2 * run.to(tl.int64), mask=mask, other=0)
    record = tl.load(run_records + 2 * run.to(tl.int64) + 1, mask=mask, other=0)
    return base + rank.to(tl.int64) * (record & 0xFFFFFFFF), (record >> 32).to(tl.int32), run


@triton.jit
def find_rows(
    run_records,
    run_starts,
    run_offsets,
    directory_kinds,
    directory,
    directory_offsets,
    table,
    num_rows,
    dim,
    row,
    mask,
):
    """Where the rows of one table lie.

    Args:
        row: int32 tile, ids in [0, num_rows).
        mask: int1 tile, whether there is a row; nothing is read where not.

    Returns:
        int64 tile, the bit of each row from the table's first byte on; int32 tiles, its coding, negative if it is
        transformed and 0 outside the mask, and its run, where the directory has runs.
    """
    kind = tl.load(directory_kinds + table)
    lines = directory + tl.load(directory_offsets + table)
    rank = row
    stored = mask
    if kind == _REMAP:
        rank = tl.load(lines.to(tl.pointer_type(tl.int32)) + row, mask=mask, other=0)
    if kind == _WAVELET:
        rank = _wavelet_rank(lines, row, mask)
    if (kind == _BITMAP) | (kind == _BITMAP_NIBBLE):
        kept, rank = _bitmap_rank(lines, row, mask)
        stored = mask & kept
    if (kind == _NIBBLE) | (kind == _BITMAP_NIBBLE):
        if kind == _BITMAP_NIBBLE:
            lines += tl.cdiv(num_rows, _BITMAP_ROWS).to(tl.int64) * _LINE_BYTES
        unit, coding = _nibble_row(lines, rank, stored)
        start = unit * (tl.cdiv(dim, 8) * 8)
        run = tl.zeros_like(rank)
    else:
        start, coding, run = _run_row(run_records, run_starts, run_offsets, table, rank, stored)
    return start, tl.where(stored, coding, 0), run
