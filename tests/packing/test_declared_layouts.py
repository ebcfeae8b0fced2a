"""Layouts by declared widths are those that the lines hold, and lies that runs or bitmaps show are found."""

import pytest
import torch

from tests.packing.random_tables import KINDS
from tests.packing.test_validate import tables
from torchrec_mpe.ops.directory import Directory
from torchrec_mpe.packing.declared_layouts import declared_layouts
from torchrec_mpe.packing.validate import validate_packed_tables


def test_equal_to_what_is_read() -> None:
    packed = tables()
    widths = [layout.rows_per_width for layout in packed.layouts()]
    assert declared_layouts(packed, widths) == packed.layouts()
    validate_packed_tables(packed, widths)


@pytest.mark.parametrize("table", range(len(KINDS)))
@pytest.mark.parametrize(
    "change", [{0: 1}, {1: -1, 0: 1}, {0: 1, 3: -1}, {8: 2**40}], ids=["too many", "negative", "moved", "huge"]
)
def test_lies(table: int, change: dict[int, int]) -> None:
    packed = tables()
    widths = [list(layout.rows_per_width) for layout in packed.layouts()]
    if widths[table][3] == 0 and 3 in change:
        change = {0: 1, 4: -1}
    for bits, rows in change.items():
        widths[table][bits] += rows
    if table == Directory.NIBBLE and sum(change.values()) == 0 and min(widths[table]) >= 0:
        declared_layouts(packed, widths)  # only its lines would tell
        return
    with pytest.raises(ValueError, match=f"table t{table}: "):
        declared_layouts(packed, widths)
    with pytest.raises(ValueError, match=f"table t{table}: "):
        validate_packed_tables(packed, widths)


def test_lines_and_remaps_are_not_read() -> None:
    packed = tables()
    widths = [layout.rows_per_width for layout in packed.layouts()]
    for t in (Directory.REMAP, Directory.NIBBLE):
        packed.directory[int(packed.directory_offsets[t]) :][:64] = 255
    validate_packed_tables(packed, widths)
    with pytest.raises(ValueError, match="table t"):
        validate_packed_tables(packed)


def test_the_weights_must_have_room_for_the_declared_rows() -> None:
    packed = tables()
    widths = [list(layout.rows_per_width) for layout in packed.layouts()]
    widths[Directory.NIBBLE] = [0] * 8 + [500]
    with pytest.raises(ValueError, match="table t2: its rows take 4000 bytes of the weights, it has"):
        validate_packed_tables(packed, widths)
    assert torch.equal(packed.rows_per_table, torch.full((5,), 500, dtype=torch.int32))
