"""Ranges of packed rows as tables: the same values, bytes and size as packing the range by itself."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.packing.random_codings import coded_collection
from tests.packing.random_tables import KINDS, random_tables
from torchrec_mpe.distributed.planner.packed_rows import widths_of_rows
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.inference.sharded.consecutive_rows import locate_consecutive
from torchrec_mpe.inference.sharded.row_ranges import RowRange, coding_of_range, take_rows, widths_of_range
from torchrec_mpe.ops.backends import use_backend
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.ops.reference.bitpack import row_bytes
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.size import packed_bytes, size_report
from torchrec_mpe.packing.validate import validate_packed_tables

DIMS = [4, 8, 13, 16, 4]


def location(packed: PackedTables, t: int) -> tuple[Directory, Tensor, int, int, Tensor, Tensor]:
    runs = slice(int(packed.run_offsets[t]), int(packed.run_offsets[t + 1]))
    return (
        Directory(int(packed.directory_kinds[t])),
        packed.directory[max(int(packed.directory_offsets[t]), 0) :],
        packed.tables[t].num_embeddings,
        row_bytes(packed.tables[t].embedding_dim, 1),
        packed.run_records[runs],
        packed.run_starts[runs],
    )


def stored(packed: PackedTables, t: int, ids: Tensor) -> list[list[int]]:
    """The bytes of every row."""
    located = packed.locate(t, ids)
    starts, bits = located.starts >> 3, located.coding
    weights, unit = packed.weights[int(packed.weights_offsets[t]) :], row_bytes(packed.tables[t].embedding_dim, 1)
    return [
        weights[start : start + width * unit].tolist()
        for start, width in zip(starts.tolist(), bits.tolist(), strict=True)
    ]


def ranges_of(packed: PackedTables, t: int) -> list[RowRange]:
    """Cuts in the middle of runs and lines, a single row, and the end."""
    rows = packed.tables[t].num_embeddings
    cuts = sorted({0, min(1, rows), rows // 3, rows // 2 + 1 if rows > 3 else 0, rows})
    return [RowRange(t, low, high - low) for low, high in pairwise(cuts)]


@pytest.mark.parametrize("seed", range(6))
def test_ranges_keep_bytes_and_values(seed: int) -> None:
    packed, dense = random_tables(seed, DIMS, KINDS)
    ranges = [r for t in (3, 1, 0, 4, 2) for r in ranges_of(packed, t)]
    ranges.append(RowRange(2, 0, packed.tables[2].num_embeddings))  # a whole table among them
    taken = take_rows(packed, ranges)
    validate_packed_tables(taken)
    assert size_report(taken).total == taken.nbytes
    tbe = PackedTableBatchedEmbeddingBags(taken)
    for k, rows in enumerate(ranges):
        ids = torch.arange(rows.num_rows)
        assert stored(taken, k, ids) == stored(packed, rows.table, ids + rows.first_row)
        values = tbe.lookup(slice(k, k + 1), ids, torch.arange(rows.num_rows + 1))
        assert torch.equal(values.double(), dense[rows.table][rows.first_row : rows.first_row + rows.num_rows])


@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_ranges_of_coded_tables(seed: int, remap: bool) -> None:
    """Rows that start at any bit keep their codes, and take the bytes of the coding of their range."""
    dims, components = [16, 3, 8, 33, 64], [16, 3, None, 0, 5]
    packed, dense = coded_collection(seed, dims, components, rows=150, remap=remap)
    ranges = [r for t in (3, 1, 0, 4, 2) for r in ranges_of(packed, t)]
    ranges += [RowRange(t, 0, 150) for t in (4, 2, 0)]
    taken = take_rows(packed, ranges)
    validate_packed_tables(taken)
    assert size_report(taken).total == taken.nbytes
    with use_backend("reference"):
        tbe = PackedTableBatchedEmbeddingBags(taken, output_dtype=torch.float64)
        for k, rows in enumerate(ranges):
            ids, own = torch.arange(rows.num_rows), slice(rows.first_row, rows.first_row + rows.num_rows)
            values = tbe.lookup(slice(k, k + 1), ids, torch.arange(rows.num_rows + 1))
            assert torch.equal(values, dense[rows.table][own])
    for rows in ranges:
        alone = take_rows(packed, [rows])
        parts = {"t": coding_of_range(packed, rows)}
        assert alone.nbytes == packed_bytes(parts, learned_zero_rows=False).total
    assert taken.nbytes <= sum(take_rows(packed, [rows]).nbytes for rows in ranges)


@pytest.mark.parametrize("kind", KINDS)
def test_consecutive_rows_are_where_the_reference_finds_them(kind: Directory) -> None:
    packed, _ = random_tables(7, [12], [kind], max_rows=3000)
    rows = packed.tables[0].num_embeddings
    assert rows > 1000  # several lines
    for start, stop in ((0, rows), (119, 121), (447, 897), (500, 501), (rows - 1, rows)):
        found = locate_consecutive(start, stop, *location(packed, 0))
        starts, bits, _ = packed.locate(0, torch.arange(start, stop))
        assert torch.equal(found[1], bits)
        assert torch.equal(found[0][bits > 0], starts[bits > 0])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_range_takes_the_bytes_of_the_plan(mapped: bool) -> None:
    """What the planner predicts from a precision plan is what slicing the packed table takes."""
    ranks = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).int() if mapped else None
    widths = TableBitWidths(5000, 16, (0, 100, 2000, 5000), (6, 2, 0), ranks)
    weight = torch.zeros(5000, 16)
    alpha = torch.tensor([0.0, *[0.1] * 8])
    table = TableToPack("t", widths, lambda a, b: weight[a:b], alpha, torch.zeros(16), torch.ones(16))
    packed = pack_tables([table])
    for start, stop in ((0, 5000), (37, 3000), (4000, 5000), (0, 1)):
        own = widths_of_range(packed, RowRange(0, start, stop - start))
        assert torch.equal(own.of_rows(), widths.of_rows(start, stop))
        taken = take_rows(packed, [RowRange(0, start, stop - start)])
        assert taken.nbytes == packed_bytes({"t": widths_of_rows(widths, start, stop)}).total


def test_all_tables_are_not_copied() -> None:
    packed, _ = random_tables(0, DIMS, KINDS)
    taken = take_rows(packed, [RowRange(t, 0, table.num_embeddings) for t, table in enumerate(packed.tables)])
    assert taken.weights.data_ptr() == packed.weights.data_ptr()


def test_rows_that_are_not_there() -> None:
    packed, dense = random_tables(0, DIMS, KINDS)
    for first, rows in ((0, 0), (-1, 2), (1, len(dense[1]))):
        with pytest.raises(ValueError, match=r"table t1: rows -?\d+ to \d+ are no part"):
            take_rows(packed, [RowRange(1, first, rows)])
