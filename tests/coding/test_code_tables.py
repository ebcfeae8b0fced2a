"""Tables coded for a number of bytes: what is promised is what decoded rows show."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.coding.tables import Ranks, RowsOfRank, trained, weight_of
from torchrec_mpe.coding.code_tables import CodedTable, code_tables
from torchrec_mpe.coding.owned_rows import TableToCode, WholeTable
from torchrec_mpe.packing.encode import coded_rows
from torchrec_mpe.packing.size import packed_bytes
from torchrec_mpe.packing.table_coding import PlainRows, TransformedRows


def measured_error(table: TableToCode, coded: CodedTable) -> float:
    """The weighted error in the damped curvature, over all rows."""
    rows = weight_of(table)
    difference = rows.double() - coded_rows(rows, coded.coding).double()
    size = float(table.curvature.diagonal().mean())
    damped = table.curvature + 0.02 * size * torch.eye(table.embedding_dim, dtype=torch.float64)
    weights = table.row_weights(slice(0, table.num_embeddings))
    return float(weights @ ((difference @ damped) * difference).sum(1))


def sizes(tables: list[TableToCode]) -> int:
    return sum(4 * t.num_embeddings * t.embedding_dim for t in tables)


@pytest.mark.parametrize("ratio", [8, 30, 100])
def test_expected_errors_are_those_of_decoded_rows(ratio: int) -> None:
    tables = [trained(3000, 16, 0, "a", unseen=100), trained(1500, 40, 1, "b", shuffled=True)]
    budget = sizes(tables) // ratio + 4 * 1500
    found = code_tables(tables, budget)
    assert list(found) == ["a", "b"]
    assert 0.99 * budget <= packed_bytes({n: c.coding for n, c in found.items()}).total <= budget
    for table in tables:
        coded = found[table.name]
        assert abs(measured_error(table, coded) / coded.summary.error - 1) < 0.1
        assert coded.summary.error < coded.summary.deviation


@pytest.mark.parametrize("dim", [1, 3, 8, 16, 33, 64, 128, 256])
@pytest.mark.parametrize("rows", [1, 40])
def test_every_dimension_and_tables_of_one_row(dim: int, rows: int) -> None:
    table = trained(rows, dim)
    budget = 300 + 6 * dim + dim * rows
    coded = code_tables([table], budget)["t"]
    assert packed_bytes({"t": coded.coding}).total <= budget
    assert coded.coding.components == coded.summary.components <= min(dim, 16 if dim <= 32 else 8)
    assert measured_error(table, coded) <= 1.01 * coded.summary.error + 1e-4 * coded.summary.deviation


def test_two_ranks_find_what_one_process_finds() -> None:
    tables = [trained(3000, 16, 0, "a", unseen=100), trained(500, 24, 1, "b", shuffled=True)]
    alone = code_tables(tables, 12000)

    def on_rank(rank: int) -> dict[str, CodedTable]:
        mine = [replace(t, rows=RowsOfRank(ranks, rank, weight_of(t))) for t in tables]
        return code_tables(mine, 12000)

    ranks = Ranks(2)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(on_rank, range(2)))
    for found in both:
        for name, coded in alone.items():
            other = found[name].coding
            assert other.bounds == coded.coding.bounds and other.groups == coded.coding.groups
            assert torch.equal(other.basis, coded.coding.basis)
            assert torch.allclose(other.encoder, coded.coding.encoder, rtol=1e-6, atol=1e-7)


def test_every_rank_hears_of_a_row_that_is_not_finite() -> None:
    table = trained(300, 8)
    weight = weight_of(table).clone()
    weight[45, 3] = torch.nan
    ranks = Ranks(2)

    def on_rank(rank: int) -> str:
        with pytest.raises(ValueError) as found:
            code_tables([replace(table, rows=RowsOfRank(ranks, rank, weight))], 3000)
        return str(found.value)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(on_rank, range(2))) == ["table t: row 45 holds NaN or infinite values"] * 2


def test_rows_without_lookups_read_the_zero_row() -> None:
    table = trained(200, 8, unseen=50)
    zero_row = torch.arange(8.0)
    coded = code_tables([replace(table, zero_row=zero_row)], 2000)["t"]
    assert coded.coding.groups[-1] == PlainRows(0) and coded.coding.bounds[-2] == 150
    assert torch.equal(coded_rows(weight_of(table), coded.coding)[150:], zero_row.repeat(50, 1))
    assert coded.summary.unseen_rows == 50
    mean = code_tables([table], 2000)["t"].coding
    assert mean.zero_row is not None and torch.equal(mean.zero_row, mean.mean)
    assert code_tables([trained(200, 8)], 2000)["t"].coding.zero_row is None


def test_a_table_without_any_lookups_reads_its_zero_row() -> None:
    table = replace(trained(50, 8), counts=torch.zeros(50, dtype=torch.int64), zero_row=torch.ones(8))
    coded = code_tables([table, trained(300, 8, name="u")], 2000)["t"]
    assert coded.coding.groups == (PlainRows(0),) and coded.coding.components == 0
    assert torch.equal(coded_rows(weight_of(table), coded.coding), torch.ones(50, 8))


def test_summaries_count_every_row_once() -> None:
    tables = [trained(3000, 64, 0, "a", unseen=70), trained(40, 64, 1, "b")]
    for name, coded in code_tables(tables, sizes(tables) // 40).items():
        s, coding = coded.summary, coded.coding
        assert s.plain_rows + s.transformed_rows + s.unseen_rows + s.zero_rows == coding.num_embeddings
        kinds = {TransformedRows: 0, PlainRows: 0}
        for low, high, group in zip(coding.bounds, coding.bounds[1:], coding.groups, strict=False):
            kinds[type(group)] += high - low
        assert kinds[TransformedRows] == s.transformed_rows
        assert len(s.energy) == 16 and 0.9 < sum(s.energy) <= 1 + 1e-9
        assert s.unseen_rows == (70 if name == "a" else 0)


def test_many_small_tables_are_not_eaten_by_metadata() -> None:
    generator = torch.Generator().manual_seed(5)
    small = [int(n) for n in torch.randint(5, 500, (24,), generator=generator)]
    tables = [trained(n, 16, k, f"s{k}") for k, n in enumerate(small)] + [trained(20000, 16, 99, "large")]
    budget = sizes(tables) // 60
    found = code_tables(tables, budget)
    assert 0.99 * budget <= packed_bytes({n: c.coding for n, c in found.items()}).total <= budget
    relative = [found[t.name].summary.error / found[t.name].summary.deviation for t in tables[:-1]]
    assert sum(relative) / len(relative) < 0.2
    metadata = sum(20 * len(c.coding.groups) + 2 * sum(len(g.levels) for g in c.coding.groups) for c in found.values())
    assert metadata < budget / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: code_tables([], 1000), "there must be tables"),
        (lambda t: code_tables([t, t], 1000), "each with a name of its own, got ['t', 't']"),
        (lambda t: code_tables([t], 1000, max_components=17), "max_components must lie between 0 and 16, got 17"),
        (lambda t: code_tables([t], 10), "a budget of 10 bytes cannot be met"),
    ],
)
def test_what_cannot_be_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(trained(30, 4))  # type: ignore[operator]


def test_no_components_means_plain_rows_only() -> None:
    coded = code_tables([trained(500, 16)], 3000, max_components=0)["t"]
    assert coded.coding.components == 0 and all(isinstance(g, PlainRows) for g in coded.coding.groups)


def test_the_same_call_finds_the_same_coding() -> None:
    table = trained(2000, 16)
    first, second = (code_tables([replace(table, rows=WholeTable(weight_of(table).clone()))], 4000)["t"] for _ in "ab")
    assert first.coding.groups == second.coding.groups and first.coding.bounds == second.coding.bounds
    assert torch.equal(first.coding.encoder, second.coding.encoder)
