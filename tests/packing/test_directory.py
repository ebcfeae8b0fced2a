"""Directories: bytes by hand, what every id decodes to, and the choice of a kind."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packing.random_tables import KINDS, random_tables
from tests.packing.test_packing import any_widths, to_pack
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.packed_embedding_bag import packed_embedding_bag
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.choose_directory import choose_directory, feasible_directories
from torchrec_mpe.packing.layout import lay_out_table
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.size import packed_bytes, size_report
from torchrec_mpe.packing.validate import validate_packed_tables

DIMS = (1, 5, 8, 16, 20, 64, 129)


def reversed_ranks(rows: int) -> torch.Tensor:
    return torch.arange(rows - 1, -1, -1, dtype=torch.int32)


def test_nibbles_by_hand() -> None:
    """122 ids of widths 0 .. 0 3 5, then 2 7: the second line starts at 8 bits; D = 16, so at byte 16."""
    widths = TableBitWidths(122, 16, (0, 1, 2, 3, 4, 122), (7, 2, 5, 3, 0), reversed_ranks(122))
    packed = pack_tables([to_pack("t", widths, directory="nibble")])
    assert packed.directory_kinds.tolist() == [2] and packed.run_starts.numel() == 0
    assert packed.weights.numel() == 64 + 64 and packed.directory.numel() == 128
    lines = packed.directory.view(2, 64).tolist()
    assert lines[0] == [0, 0, 0, 0, *[0] * 59, 3 | 5 << 4]
    assert lines[1] == [8, 0, 0, 0, 2 | 7 << 4, *[0] * 59]


def test_bitmap_by_hand() -> None:
    """450 ids, 4 bits for 0, 9, 447 and 449: three kept rows before the second line."""
    keep = [0, 9, 447, 449]
    ranks = torch.empty(450, dtype=torch.int32)
    ranks[keep] = torch.tensor([3, 1, 0, 2], dtype=torch.int32)  # kept rows lie by id, whatever their ranks
    ranks[[k for k in range(450) if k not in keep]] = torch.arange(4, 450, dtype=torch.int32)
    packed = pack_tables([to_pack("t", TableBitWidths(450, 8, (0, 4, 450), (4, 0), ranks), directory="bitmap")])
    assert packed.directory_kinds.tolist() == [3]
    lines = packed.directory.view(2, 64).tolist()
    assert lines[0] == [*[0] * 8, 1, 2, *[0] * 53, 128]
    assert lines[1] == [3, *[0] * 7, 2, *[0] * 55]
    assert packed.run_records.tolist() == [[0, 32 | 4 << 32]] and packed.run_starts.tolist() == [0]


def test_bitmap_and_nibbles_by_hand() -> None:
    """Ids 2 and 5 keep 1 and 6 bits of 6 ids."""
    ranks = torch.tensor([2, 3, 1, 4, 5, 0], dtype=torch.int32)
    packed = pack_tables([to_pack("t", TableBitWidths(6, 8, (0, 1, 2, 6), (6, 1, 0), ranks), directory="bitmap")])
    assert packed.directory_kinds.tolist() == [4] and packed.run_offsets.tolist() == [0, 0]
    lines = packed.directory.view(2, 64).tolist()
    assert lines[0] == [*[0] * 8, 0b100100, *[0] * 55]
    assert lines[1] == [0, 0, 0, 0, 1 | 6 << 4, *[0] * 59]


def test_every_id_decodes_to_its_row() -> None:
    for seed, dim in enumerate(DIMS):
        packed, dense = random_tables(seed, [dim] * len(KINDS), KINDS)
        validate_packed_tables(packed)
        rows = [len(table) for table in dense]
        features = len(dense)
        batch = max(rows)
        lengths = [1 if row < n else 0 for n in rows for row in range(batch)]
        out = packed_embedding_bag(
            *packed.tensors().values(),  # type: ignore[arg-type]
            [dim * f for f in range(features + 1)],
            list(range(features)),
            [0] * features,
            torch.cat([torch.arange(n) for n in rows]),
            torch.tensor([0, *itertools.accumulate(lengths)]),
            output_dtype=torch.float64,
            backend="reference",
        )
        for t, table in enumerate(dense):
            torch.testing.assert_close(out[: rows[t], t * dim : (t + 1) * dim], table, rtol=0, atol=0)


def test_layouts_are_what_was_packed() -> None:
    """What is read from the tensors is what the widths say, for every kind."""
    for widths, directory in itertools.product(some_widths(), ("auto", "ranked", "remap", "nibble", "bitmap")):
        try:
            layout = choose_directory("t", widths, directory)
        except ValueError:
            continue
        packed = pack_tables([to_pack("t", widths, directory=directory)])
        assert packed.layouts() == (layout,)
        assert size_report(packed) == packed_bytes({"t": widths}, directory=directory)
        assert size_report(packed).tables[0].directory_kind == layout.directory.name.lower()
        validate_packed_tables(packed)


def some_widths() -> list[TableBitWidths]:
    generator = torch.Generator().manual_seed(3)
    tables = []
    for rows, bounds, bits in (
        (1, (0, 1), (8,)),
        (1, (0, 1), (0,)),
        (1000, (0, 1000), (0,)),
        (1000, (0, 1000), (3,)),
        (1000, (0, 100, 1000), (3, 0)),
        (2000, (0, 10, 30, 2000), (6, 2, 0)),
        (960, (0, 100, 400, 960), (6, 4, 1)),
        (448, (0, 1, 2, 3, 447, 448), (1, 0, 1, 0, 1)),
        (40, tuple(range(41)), (8, 7, 0, 1) * 10),
    ):
        for ranks in (None, torch.randperm(rows, generator=generator).to(torch.int32)):
            tables.append(TableBitWidths(rows, 8, bounds, bits, ranks))
    return tables


@settings(max_examples=100, deadline=None)
@given(any_widths())
def test_auto_is_the_smallest(widths: TableBitWidths) -> None:
    """Brute force over the bytes of tensors packed with every kind."""
    totals: dict[Directory, int] = {}
    for directory in ("ranked", "remap", "nibble", "bitmap"):
        try:
            packed = pack_tables([to_pack("t", widths, directory=directory)])
        except ValueError:
            continue
        totals[Directory(int(packed.directory_kinds[0]))] = packed.nbytes
    chosen = pack_tables([to_pack("t", widths)])
    kind = Directory(int(chosen.directory_kinds[0]))
    assert chosen.nbytes == min(totals.values())
    assert kind == min(k for k, total in totals.items() if total == chosen.nbytes)


def test_what_large_tables_get() -> None:
    """1e8 rows in any order, without a pass over them: most of no bits, or a few bits each."""
    order = torch.empty(0)
    rows = 100_000_000

    def kind(bounds: tuple[int, ...], bits: tuple[int, ...], mapped: bool = True) -> Directory:
        widths = TableBitWidths(rows, 16, bounds, bits)
        if mapped:
            object.__setattr__(widths, "order", order)
        return choose_directory("t", widths).directory

    assert kind((0, rows), (4,)) == Directory.RANKED
    assert kind((0, 10**6, rows), (4, 0), mapped=False) == Directory.RANKED
    assert kind((0, 10**6, rows), (4, 0)) == Directory.BITMAP
    assert kind((0, 10**6, 10**7, rows), (6, 2, 0)) == Directory.BITMAP_NIBBLE
    assert kind((0, 10**6, 10**7, rows), (6, 2, 1)) == Directory.NIBBLE
    wide = TableBitWidths(600_000_000, 8, (0, 1, 600_000_000), (7, 8))
    assert Directory.NIBBLE not in feasible_directories(wide)  # 4.8e9 units do not fit into the base
    with pytest.raises(ValueError, match=r"table t cannot have a nibble directory, .* 32 bits: choose .* ranked"):
        choose_directory("t", wide, "nibble")


def test_byte_offsets_of_large_tables() -> None:
    """Far beyond 2**31 bytes: 1e9 rows of 8 and 7 bits at D = 128, by hand."""
    widths = TableBitWidths(10**9, 128, (0, 5 * 10**8, 10**9), (8, 7))
    runs = lay_out_table("t", widths, Directory.RANKED).runs
    assert runs[1].first_byte == 5 * 10**8 * 128 and runs[1].end == 5 * 10**8 * (128 + 112)
    assert runs[1].record == (8 * 5 * 10**8 * (128 - 112), 8 * 112 | 7 << 32)


def test_choices_that_cannot_store_the_widths() -> None:
    ranked = TableBitWidths(4, 8, (0, 2, 4), (3, 2))
    mapped = TableBitWidths(4, 8, (0, 2, 4), (3, 2), reversed_ranks(4))
    for widths, directory, message in (
        (mapped, "ranked", "table t cannot have a ranked directory, its ids are not .*: choose auto or one of remap"),
        (ranked, "remap", "table t cannot have a remap directory, .* need no remap: choose auto or one of ranked"),
        (ranked, "bitmap", "table t cannot have a bitmap directory, it has several bit-widths"),
        (mapped, "wavelet", "table t cannot have a wavelet directory, it is not transform-coded: choose auto"),
        (ranked, "hash", "table t: directory must be one of auto, ranked, remap, nibble, bitmap, wavelet, got 'hash'"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_tables([to_pack("t", widths, directory=directory)])
        with pytest.raises(ValueError, match=message):
            packed_bytes({"t": widths}, directory={"t": directory})
    with pytest.raises(ValueError, match="a directory is chosen for u; the tables are t"):
        packed_bytes({"t": ranked}, directory={"u": "auto"})


def test_rows_of_one_width_need_no_remap() -> None:
    widths = TableBitWidths(300, 8, (0, 100, 300), (5, 5), reversed_ranks(300))
    packed = pack_tables([to_pack("t", widths)])
    assert packed.directory_kinds.tolist() == [Directory.RANKED] and packed.directory.numel() == 0
    in_order = pack_tables([to_pack("t", TableBitWidths(300, 8, (0, 300), (5,)))])
    assert torch.equal(packed.weights, in_order.weights)


@settings(max_examples=30, deadline=None)
@given(st.lists(any_widths(), min_size=1, max_size=3))
def test_tables_beside_each_other_do_not_touch(tables: list[TableBitWidths]) -> None:
    """Each table's bytes are those that it has alone."""
    packed = pack_tables([to_pack(f"t{k}", widths) for k, widths in enumerate(tables)])
    for k, widths in enumerate(tables):
        alone = pack_tables([to_pack(f"t{k}", widths)])
        start, part = int(packed.weights_offsets[k]), int(packed.directory_offsets[k])
        size = alone.weights.numel() - 64
        assert torch.equal(packed.weights[start : start + size], alone.weights[:size])
        if part >= 0:
            assert torch.equal(packed.directory[part : part + alone.directory.numel()], alone.directory)
