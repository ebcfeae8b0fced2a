"""Layout, bytes and codes of packed tables."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.size import packed_bytes, size_report
from torchrec_mpe.packing.validate import validate_packed_tables

ALPHA = torch.tensor([0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625])


def to_pack(
    name: str, widths: TableBitWidths, seed: int = 0, zero: bool = True, directory: str = "auto"
) -> TableToPack:
    rows = torch.randn(widths.num_embeddings, widths.embedding_dim, generator=torch.Generator().manual_seed(seed))
    beta = torch.linspace(-0.1, 0.1, widths.embedding_dim)
    zero_row = torch.full((widths.embedding_dim,), 7.0) if zero else None
    return TableToPack(name, widths, lambda start, stop: rows[start:stop], ALPHA, beta, zero_row, directory)


def test_layout_by_hand() -> None:
    """D = 8. 10 rows of 6 bits: 60 bytes; 3 bits from byte 64: 5 rows, 15 bytes; table u's 2 bits from byte 128."""
    t = TableBitWidths(20, 8, (0, 10, 15, 20), (6, 3, 0))
    u = TableBitWidths(3, 8, (0, 3), (2,))
    packed = pack_tables([to_pack("t", t, directory="ranked"), to_pack("u", u)])
    assert packed.weights.numel() == 128 + 64 + 64 and packed.weights_offsets.tolist() == [0, 128]
    assert packed.run_starts.tolist() == [0, 10, 15, 0] and packed.run_offsets.tolist() == [0, 3, 4]
    # {base - first * row_bits, row_bits | coding << 32}, the base counted in bits from the table's first byte
    second = [8 * (64 - 10 * 3), 24 | 3 << 32]
    assert packed.run_records.tolist() == [[0, 48 | 6 << 32], second, [0, 0], [0, 16 | 2 << 32]]
    assert not packed.weights[60:64].any() and not packed.weights[79:128].any() and not packed.weights[134:].any()
    assert packed.directory_offsets.tolist() == [-1, -1] and packed.directory.numel() == 0


def test_codes_by_hand() -> None:
    """2 bits, alpha 1, beta 0: x = -9 -1 0 .4 .6 1 2 -2 gives q = -2 -1 0 0 1 1 1 -2, stored as q + 2."""
    row = torch.tensor([[-9.0, -1, 0, 0.4, 0.6, 1, 2, -2]])
    widths = TableBitWidths(1, 8, (0, 1), (2,))
    packed = pack_tables([TableToPack("t", widths, lambda a, b: row[a:b], ALPHA, torch.zeros(8), None)])
    # 0 1 2 2 | 3 3 3 0 -> 0b10_10_01_00, 0b00_11_11_11
    assert packed.weights[:2].tolist() == [0b10100100, 0b00111111]


def test_mapped_rows_lie_by_width_and_rank() -> None:
    """Ranks 3 1 0 2 with widths 8 0 8 0: stored ranks 0 and 1 are rows 2 and 3."""
    ranks = torch.tensor([3, 1, 0, 2], dtype=torch.int32)
    widths = TableBitWidths(4, 8, (0, 1, 2, 3, 4), (8, 0, 8, 0), ranks)
    packed = pack_tables([to_pack("t", widths, directory="remap")])
    assert packed.directory.view(torch.int32).tolist() == [3, 2, 0, 1, *[0] * 12]
    assert packed.run_starts.tolist() == [0, 2]


@pytest.mark.parametrize("directory", ["ranked", "remap", "nibble", "bitmap"])
def test_rows_are_read_in_pieces(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = torch.randperm(1500, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    bounds, bits = (0, 7, 100, 101, 400, 1500), (5, 3, 3, 1, 0)
    widths = TableBitWidths(1500, 8, bounds, bits, None if directory == "ranked" else ranks)
    whole = pack_tables([to_pack("t", widths, directory=directory)])
    monkeypatch.setattr("torchrec_mpe.packing.pack._CHUNK_ELEMENTS", 64)
    monkeypatch.setattr("torchrec_mpe.packing.directory_lines._CHUNK_ROWS", 64)
    pieces = pack_tables([to_pack("t", widths, directory=directory)])
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, pieces.tensors()[name]), name
    assert pieces.layouts() == whole.layouts()


def test_rows_of_no_bits_need_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_mpe.packing.pack._CHUNK_ELEMENTS", 8 * 10)
    widths = TableBitWidths(100, 8, (0, 20, 100), (4, 0))
    for directory in ("ranked", "nibble", "bitmap"):
        asked: list[tuple[int, int]] = []
        source = to_pack("t", widths)

        def rows(start: int, stop: int, source: TableToPack = source, asked: list[tuple[int, int]] = asked) -> Tensor:
            asked.append((start, stop))
            return source.rows(start, stop)

        pack_tables([dataclasses.replace(source, rows=rows, directory=directory)])
        assert asked == [(0, 10), (10, 20)]


@st.composite
def any_widths(draw: st.DrawFn) -> TableBitWidths:
    bits = draw(st.lists(st.integers(0, 8), min_size=1, max_size=6))
    lengths = draw(st.lists(st.integers(1, 9), min_size=len(bits), max_size=len(bits)))
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    ranks = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        ranks = torch.randperm(bounds[-1], generator=generator).to(torch.int32)
    return TableBitWidths(bounds[-1], draw(st.sampled_from([1, 5, 8, 16, 20])), tuple(bounds), tuple(bits), ranks)


@settings(max_examples=60, deadline=None)
@given(st.lists(any_widths(), min_size=1, max_size=3), st.booleans())
def test_every_byte_is_counted_beforehand(tables: list[TableBitWidths], zero: bool) -> None:
    named = {f"t{k}": widths for k, widths in enumerate(tables)}
    packed = pack_tables([to_pack(name, widths, zero=zero) for name, widths in named.items()])
    validate_packed_tables(packed)
    report = size_report(packed)
    assert report.total == packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors().values())
    assert report == packed_bytes(named, learned_zero_rows=zero)
    assert report.total == sum(table.total for table in report.tables)
    assert report.fp32_bytes == sum(4 * w.num_embeddings * w.embedding_dim for w in tables)
    for table, widths in zip(report.tables, tables, strict=True):
        payload = sum(n * b * -(-widths.embedding_dim // 8) for b, n in enumerate(widths.rows_per_width()))
        assert table.payload == payload and list(table.rows_per_width) == widths.rows_per_width()


def test_misuse_names_the_table() -> None:
    widths = TableBitWidths(4, 8, (0, 4), (2,))
    good = to_pack("t", widths)
    with pytest.raises(ValueError, match="table t is given twice"):
        pack_tables([good, good])
    with pytest.raises(ValueError, match="table t"):
        pack_tables([TableToPack("t", widths, good.rows, torch.zeros(9), good.beta)])
    with pytest.raises(ValueError, match="table t"):
        pack_tables([TableToPack("t", widths, lambda a, b: torch.full((b - a, 8), float("nan")), ALPHA, good.beta)])
    with pytest.raises(ValueError, match="table t"):
        pack_tables([TableToPack("t", widths, lambda a, b: torch.zeros(b - a, 7), ALPHA, good.beta)])
