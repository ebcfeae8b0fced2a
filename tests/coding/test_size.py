"""Bytes while a coding is chosen are those of the packed tables."""

import pytest

from tests.packing.random_codings import random_coding
from torchrec_mpe.coding.size import CodedRun, TableRuns, coded_bytes
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding


def runs_of(coding: TableCoding) -> TableRuns:
    dim = coding.embedding_dim
    runs = tuple(
        CodedRun(stop - first, group.row_bits(dim), len(group.levels), isinstance(group, PlainRows))
        for first, stop, group in zip(coding.bounds, coding.bounds[1:], coding.groups, strict=False)
    )
    zero_row = coding.zero_row is not None and PlainRows(0) in coding.groups
    return TableRuns(runs, coding.num_embeddings, dim, coding.components, coding.order is not None, zero_row)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_are_those_of_the_packed_tables(seed: int) -> None:
    shapes = [(1, 1, 1), (37, 3, 2), (400, 16, 16), (150, 40, 8), (90, 64, 0)]
    codings = {
        f"t{k}": random_coding(seed * 10 + k, rows, dim, components, remap=(seed + k) % 3 == 0)[0]
        for k, (rows, dim, components) in enumerate(shapes)
    }
    assert coded_bytes(map(runs_of, codings.values())) == packed_bytes(codings).total


def test_a_table_is_counted_by_hand() -> None:
    runs = (CodedRun(10, 48, 1, True), CodedRun(71, 7, 4, False), CodedRun(19, 0, 0, True))
    table = TableRuns(runs, 100, 16, 4, False, True)
    metadata = 48 + 3 * 20 + 2 * (1 + 4) + 5 * 16 * 2 + 4 * 16
    assert table.sizes == (10 * 6 + -(-71 * 7 // 8), 8, metadata)
    assert coded_bytes([table]) == 4 + 64 + 128 + metadata
