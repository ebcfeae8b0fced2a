"""Where many rows of a packed table lie, found a piece at a time."""

import torch
from torch import Tensor

from torchrec_mpe.ops.reference.locate import Located
from torchrec_mpe.packing.packed_tables import PackedTables

_CHUNK_ROWS = 1 << 14


def locate_rows(packed: PackedTables, t: int, ids: Tensor) -> Located:
    """:meth:`PackedTables.locate` for ids int64 [n] of any number.

    Raises:
        ValueError: naming the table, if its directory leads to runs that it does not have.
    """
    found = Located(*(torch.empty_like(ids) for _ in range(3)))
    for chunk in range(0, ids.numel(), _CHUNK_ROWS):
        part = slice(chunk, chunk + _CHUNK_ROWS)
        try:
            located = packed.locate(t, ids[part])
        except IndexError:
            raise damaged_directory(packed, t) from None
        for all_rows, of_part in zip(found, located, strict=True):
            all_rows[part] = of_part
    return found


def damaged_directory(packed: PackedTables, t: int) -> ValueError:
    """What to raise if a table's directory or runs lead somewhere else than to its rows."""
    return ValueError(f"table {packed.tables[t].name}: the table's directory or runs lead outside its rows")
