"""Rows written over old ones of coded tables are bit for bit what packing makes, and their neighbours as they were."""

import pytest
import torch
from torch import Tensor

from tests.ops.every_backend import on
from tests.packing.random_codings import coded_table, random_coding
from tests.threads import repeat_in_threads
from torchrec_mpe.inference.packed_table_batched_embedding_bags import PackedTableBatchedEmbeddingBags
from torchrec_mpe.ops import library
from torchrec_mpe.packing.pack import pack_tables
from torchrec_mpe.packing.packed_tables import PackedTables
from torchrec_mpe.packing.table_coding import PlainRows, TableCoding, TransformedRows
from torchrec_mpe.packing.update import UpdatedRows, update_packed_tables_

ROWS = 300
SHAPES = ((1, 1), (5, 3), (8, 8), (16, 16), (33, 4), (64, 0))
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(not library.is_loaded(), reason="no library"))]


def codings(seed: int, remap: bool) -> list[tuple[TableCoding, Tensor]]:
    return [random_coding(seed + t, ROWS, dim, k, remap=remap) for t, (dim, k) in enumerate(SHAPES)]


def packed_of(coded: list[tuple[TableCoding, Tensor]], rows: list[Tensor]) -> PackedTables:
    return pack_tables([coded_table(f"t{t}", c, rows[t]) for t, (c, _) in enumerate(coded)])


def encoders_of(coded: list[tuple[TableCoding, Tensor]]) -> dict[str, Tensor]:
    return {f"t{t}": coding.encoder for t, (coding, _) in enumerate(coded)}


def equal(one: PackedTables, other: PackedTables) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def bits_of_rows(coding: TableCoding) -> Tensor:
    """By id."""
    places = torch.arange(coding.num_embeddings) if coding.order is None else coding.order.long()
    groups = torch.searchsorted(torch.tensor(coding.bounds[1:]), places, right=True)
    return torch.tensor([group.row_bits(coding.embedding_dim) for group in coding.groups])[groups]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("remap", [False, True], ids=["ranked", "remap"])
@pytest.mark.parametrize("count", [1, 40, 200])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_equals_packing_from_scratch(
    backend: str, remap: bool, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_mpe.packing.update_coded._CHUNK_ROWS", 37)
    generator = torch.Generator().manual_seed(count)
    for seed in (0, 100, 200):
        coded = codings(seed, remap)
        old = [values.float() for _, values in coded]
        packed, new = packed_of(coded, old), [rows.clone() for rows in old]
        delta, expected = {}, {}
        for t, (coding, _) in enumerate(coded):
            if t == 2:
                continue  # stays as it is
            ids = torch.randperm(ROWS, generator=generator)[:count]
            new[t][ids] = torch.randn(count, coding.embedding_dim, generator=generator)
            delta[f"t{t}"] = (ids.to(dtype), new[t][ids])
            written = int((bits_of_rows(coding)[ids] > 0).sum())
            expected[f"t{t}"] = UpdatedRows(written, count - written)
        with on(backend):
            assert update_packed_tables_(packed, delta, encoders_of(coded)) == expected
        assert equal(packed, packed_of(coded, new)) and not equal(packed, packed_of(coded, old))


def small() -> tuple[TableCoding, PackedTables]:
    """Rows of 3 bits, plain ones of 2, transformed and plain ones of none; all zeros."""
    coding = TableCoding(
        40,
        4,
        (0, 20, 30, 35, 40),
        (
            TransformedRows((1, 2, 0, 0, 0), (1, 1), (0, 0), 2),
            PlainRows(2, 1.0),
            TransformedRows((0,) * 5, (), (), 2),
            PlainRows(0),
        ),
        torch.eye(4)[[0, 1, 3]].half(),
        torch.eye(4)[:, :2].contiguous(),
    )
    return coding, pack_tables([coded_table("t", coding, torch.zeros(40, 4))])


def test_the_last_of_equal_ids_stays_and_rows_without_bits_are_counted() -> None:
    coding, packed = small()
    ids, values = torch.tensor([3, 4, 3, 25, 33, 38, 33]), torch.ones(7, 4)
    values[2, 1] = 2.0
    assert update_packed_tables_(packed, {"t": (ids, values)}, {"t": coding.encoder}) == {"t": UpdatedRows(3, 2)}
    rows = torch.zeros(40, 4)
    rows[ids[1:]] = values[1:]
    assert equal(packed, pack_tables([coded_table("t", coding, rows)]))
    none = {"t": (torch.tensor([], dtype=torch.int64), torch.empty(0, 4))}
    assert update_packed_tables_(packed, none, {"t": coding.encoder}) == {"t": UpdatedRows(0, 0)}


@pytest.mark.parametrize(
    ("encoder", "value", "error", "message"),
    [
        (None, 1.0, ValueError, "table t is transform-coded and its encoder is not here: update the collection that "),
        (torch.zeros(4, 3), 1.0, ValueError, r"table t: its encoder must be \[4, 2\], got \[4, 3\]"),
        (torch.zeros(4, 2).double(), 1.0, TypeError, r"table t: its encoder must be float32, got torch.float64"),
        (torch.zeros(4, 2), float("inf"), ValueError, "table t: the values of id 6 hold NaN or infinite values"),
        (torch.zeros(4, 2), float("nan"), ValueError, "table t: the values of id 6 hold NaN or infinite values"),
    ],
)
def test_a_mistake_changes_nothing(encoder: Tensor | None, value: float, error: type[Exception], message: str) -> None:
    coding, _ = small()
    packed = pack_tables([coded_table(name, coding, torch.zeros(40, 4)) for name in ("s", "t")])
    before = packed.weights.clone()
    values = torch.ones(2, 4)
    good = (torch.tensor([5, 6]), values.clone())
    values[1, 2] = value
    encoders = {"s": coding.encoder} | ({} if encoder is None else {"t": encoder})
    with pytest.raises(error, match=message):
        update_packed_tables_(packed, {"s": good, "t": (torch.tensor([5, 6]), values)}, encoders)
    assert torch.equal(packed.weights, before)
    update_packed_tables_(packed, {"s": good}, encoders)
    assert not torch.equal(packed.weights, before)


@pytest.mark.parametrize("word", [0x7F7F7F7F, -2, 40])
def test_no_row_leaves_its_table_where_the_directory_is_damaged(word: int) -> None:
    """As where an artifact is mapped without reading all of it."""
    order = torch.arange(39, -1, -1, dtype=torch.int32)
    coding = TableCoding(
        40, 8, (0, 40), (PlainRows(4, 1.0),), torch.eye(8)[:2].half(), torch.eye(8)[:, :1].contiguous(), None, order
    )
    packed = pack_tables([coded_table("t", coding, torch.zeros(40, 8), 40, "remap")])
    before = packed.weights.clone()
    packed.directory[:160].view(torch.int32)[7] = word
    with pytest.raises(ValueError, match="table t: the table's directory or runs lead outside its rows"):
        update_packed_tables_(packed, {"t": (torch.arange(40), torch.ones(40, 8))}, {"t": coding.encoder})
    assert torch.equal(packed.weights, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 3])
def test_rows_that_share_bytes_are_each_old_or_new(backend: str, bits: int) -> None:
    """Two threads write neighbours of each other, and two look up: 3 or 9 bits a row, all codes of a row alike."""
    rows = 500
    coding = TableCoding(
        rows,
        3,
        (0, rows),
        (TransformedRows((bits, bits, bits, 0, 0), (1.0,) * 3, (0.0,) * 3, 3),),
        torch.eye(4)[:, :3].half(),
        torch.eye(3),
    )
    tbe = PackedTableBatchedEmbeddingBags(pack_tables([coded_table("t", coding, torch.zeros(rows, 3))]))
    begun, complete, read = [0, 0], [0, 0], [0]
    offsets = torch.arange(rows + 1)

    def write(writer: int) -> None:
        ids = torch.arange(writer, rows, 2)
        with on(backend):
            begun[writer] += 1
            values = torch.full((len(ids), 3), float(begun[writer] % (1 << bits)))
            tbe.apply_update({"t": (ids, values)}, {"t": coding.encoder})
            complete[writer] += 1

    def look_up() -> None:
        oldest = list(complete)
        with on(backend):
            found = tbe(torch.arange(rows), offsets)
        newest = list(begun)
        assert found.amin(1).equal(found.amax(1)), "a row is half of one update and half of another"
        for writer in (0, 1):
            allowed = [update % (1 << bits) for update in range(oldest[writer], newest[writer] + 1)]
            of_writer = found[writer::2, 0].round().long()
            assert torch.isin(of_writer, torch.tensor(allowed)).all(), "a row is older than the last update, or of none"
        read[0] += 1

    repeat_in_threads([lambda: write(0), lambda: write(1), look_up, look_up], 1.0)
    assert min(complete) > 1 and read[0] > 1
    found = tbe(torch.arange(rows), offsets)[:, 0]
    assert all(found[w::2].eq(complete[w] % (1 << bits)).all() for w in (0, 1)), "an update undid its neighbours"
