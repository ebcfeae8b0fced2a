"""Rows written over old ones are bit for bit what packing the new table from scratch makes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.packing.random_tables import ALPHA
from torchrec_mpe.packing.bit_widths import TableBitWidths
from torchrec_mpe.packing.pack import TableToPack, pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.update import UpdatedRows, update_packed_tables_

ROWS = 1000
WIDTHS = {
    "ranked": ((0, 10, 300, 700, 1000), (8, 3, 1, 0), False),
    "remap": ((0, 10, 300, 700, 1000), (5, 3, 7, 2), True),
    "nibble": ((0, 100, 300, 700, 1000), (8, 0, 1, 4), True),
    "bitmap": ((0, 100, 1000), (6, 0), True),
    "bitmap of several": ((0, 40, 100, 1000), (6, 1, 0), True),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_of(rows: Sequence[Tensor]) -> PackedTables:
    """One table of each directory, of dimension 5, 8, 11, 16 and 40."""
    tables = []
    for t, (name, (bounds, bits, mapped)) in enumerate(WIDTHS.items()):
        ranks = torch.randperm(ROWS, generator=torch.Generator().manual_seed(t)).to(torch.int32) if mapped else None
        values, dim = rows[t], rows[t].shape[1]
        tables.append(
            TableToPack(
                name,
                TableBitWidths(ROWS, dim, bounds, bits, ranks),
                lambda start, stop, values=values: values[start:stop],  # type: ignore[misc]
                ALPHA,
                random(dim, seed=50 + t) / 10,
                torch.full((dim,), 7.0) if t % 2 else None,
                name.split()[0],
            )
        )
    return pack_tables(tables)


def old_rows() -> list[Tensor]:
    return [random(ROWS, dim, seed=t) for t, dim in enumerate((5, 8, 11, 16, 40))]


def equal(one: PackedTables, other: PackedTables) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_equals_packing_from_scratch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_mpe.packing.update._CHUNK_ROWS", 37)
    old = old_rows()
    new = [rows.clone() for rows in old]
    packed = packed_of(old)
    delta = {}
    zero_bits = {}
    for t, (name, (bounds, bits, mapped)) in enumerate(WIDTHS.items()):
        if name == "nibble":
            continue  # stays as it is
        ids = torch.randperm(ROWS, generator=torch.Generator().manual_seed(70 + t))[:500]
        values = random(500, old[t].shape[1], seed=90 + t)
        values[0] = 1e38  # the largest code of its width
        new[t][ids] = values
        delta[name] = (ids.to(dtype), values)
        ranks = torch.randperm(ROWS, generator=torch.Generator().manual_seed(t)) if mapped else torch.arange(ROWS)
        zero = [(low, high) for low, high, b in zip(bounds, bounds[1:], bits, strict=False) if b == 0]
        zero_bits[name] = sum(int(((ranks[ids] >= low) & (ranks[ids] < high)).sum()) for low, high in zero)
    updated = update_packed_tables_(packed, delta)
    assert equal(packed, packed_of(new)) and not equal(packed, packed_of(old))
    assert updated == {name: UpdatedRows(500 - zero_bits[name], zero_bits[name]) for name in delta}
    assert all(rows > 0 for name, rows in zero_bits.items() if name != "remap")


def test_the_last_of_equal_ids_stays() -> None:
    packed, old = packed_of(old_rows()), old_rows()
    ids, values = torch.tensor([3, 5, 3, 999, 3, 5, 999]), random(7, 5, seed=1)
    assert update_packed_tables_(packed, {"ranked": (ids, values)}) == {"ranked": UpdatedRows(2, 1)}
    old[0][3], old[0][5] = values[4], values[5]
    assert equal(packed, packed_of(old))


def test_nothing_to_write() -> None:
    packed = packed_of(old_rows())
    none = (torch.tensor([], dtype=torch.int64), torch.empty(0, 5))
    assert update_packed_tables_(packed, {"ranked": none}) == {"ranked": UpdatedRows(0, 0)}
    assert update_packed_tables_(packed, {}) == {}
    assert equal(packed, packed_of(old_rows()))


def nan_at(row: int) -> Tensor:
    values = torch.zeros(2, 8)
    values[row, 3] = float("nan")
    return values


@pytest.mark.parametrize(
    ("table", "ids", "values", "error", "message"),
    [
        ("remap", [4, 1000], torch.zeros(2, 8), IndexError, r"table remap: id 1000 is not in \[0, 1000\)"),
        ("remap", [-1, 4], torch.zeros(2, 8), IndexError, r"table remap: id -1 is not in \[0, 1000\)"),
        ("remap", [4, 5], torch.zeros(2, 7), ValueError, r"table remap: .* \[n, 8\], got \[2\] and \[2, 7\]"),
        ("remap", [4, 5], torch.zeros(3, 8), ValueError, r"table remap: .* got \[2\] and \[3, 8\]"),
        ("remap", [[4, 5]], torch.zeros(2, 8), ValueError, r"table remap: ids must be \[n\]"),
        ("remap", [4.0, 5.0], torch.zeros(2, 8), TypeError, r"table remap: ids must be int32 or int64, got torch.fl"),
        ("remap", [4, 5], torch.zeros(2, 8).double(), TypeError, r"table remap: values must be float32"),
        ("remap", [4, 6], nan_at(1), ValueError, r"table remap: the values of id 6 hold NaN or inf"),
        ("other", [4, 6], torch.zeros(2, 8), KeyError, r"table other; the tables are ranked, remap, "),
    ],
)
def test_a_mistake_in_one_table_changes_none(
    table: str, ids: list[int], values: Tensor, error: type[Exception], message: str
) -> None:
    packed = packed_of(old_rows())
    good = (torch.tensor([1, 2]), torch.ones(2, 5))
    with pytest.raises(error, match=message):
        update_packed_tables_(packed, {"ranked": good, table: (torch.tensor(ids), values)})
    assert equal(packed, packed_of(old_rows()))


@pytest.mark.parametrize("table", ["remap", "nibble", "bitmap", "bitmap of several"])
def test_no_row_leaves_its_table_where_the_directory_is_damaged(table: str) -> None:
    """As where an artifact is mapped without reading all of it."""
    packed = packed_of(old_rows())
    t = list(WIDTHS).index(table)
    start = int(packed.directory_offsets[t])
    packed.directory[start : start + 64] = 0xFF if table != "remap" else 0x7F
    damaged = replace(packed, directory=packed.directory.clone())
    delta = {"ranked": (torch.tensor([1]), torch.ones(1, 5))}
    dim = packed.tables[t].embedding_dim
    with pytest.raises(ValueError, match=f"table {table}: the table's directory or runs lead outside its rows"):
        update_packed_tables_(damaged, {**delta, table: (torch.arange(ROWS), torch.ones(ROWS, dim))})
    assert torch.equal(packed.weights, packed_of(old_rows()).weights)
