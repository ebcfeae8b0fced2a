"""Bytes of coded tables, counted by hand."""

import torch

from torchrec_mpe.coding.size import CodedRun, TableRuns, bytes_of, coded_bytes
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding, TransformedRows


def test_a_table_is_counted_by_hand() -> None:
    groups = (PlainRows(3, 0.5), TransformedRows((5, 2, 0, 0, 0), (1.0, 1.0), (0.0, 0.0), 4), PlainRows(0))
    table = TableCoding(100, 16, (0, 10, 81, 100), groups, torch.ones(5, 16).half(), torch.ones(16, 4), torch.zeros(16))
    rows = 10 * 6 + -(-71 * 7 // 8)
    metadata = 48 + 3 * 20 + 2 * (1 + 4) + 5 * 16 * 2 + 4 * 16
    assert bytes_of([table]) == 68 + rows + metadata


def test_ids_that_are_not_ranks_cost_an_int32_a_row() -> None:
    order = torch.arange(100, dtype=torch.int32).flip(0)
    plain = [
        TableCoding(100, 8, (0, 100), (PlainRows(1, 1.0),), torch.ones(1, 8).half(), torch.ones(8, 0), order=places)
        for places in (None, order)
    ]
    assert bytes_of(plain[1:]) - bytes_of(plain[:1]) == 448


def test_plain_runs_and_their_tables_are_aligned() -> None:
    def table(*runs: CodedRun) -> TableRuns:
        return TableRuns(runs, 30, 16, 1, False, False)

    bits = table(CodedRun(3, 3, 2, False))
    assert bits.sizes == (2, 8, 48 + 20 + 4 + 64)
    after_bits = table(CodedRun(3, 3, 2, False), CodedRun(4, 48, 1, True))
    assert (after_bits.row_bytes, after_bits.alignment) == (2 + 24, 8)
    wide = table(CodedRun(3, 3, 2, False), CodedRun(4, 128 * 8, 1, True))
    assert (wide.row_bytes, wide.alignment) == (64 + 512, 64)
    empty = table(CodedRun(3, 0, 0, True), CodedRun(3, 0, 0, False))
    assert (empty.row_bytes, empty.alignment) == (0, 8)
    metadata = [t.metadata_bytes for t in (bits, wide, bits)]
    assert coded_bytes([bits, wide, bits]) == 68 + 64 + 576 + 2 + sum(metadata)
