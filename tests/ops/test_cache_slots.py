"""Slots of a cache: what the definition says they are, and every backend's against it, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.every_backend import CPU, FAST, on
from torchrec_mpe.ops import library
from torchrec_mpe.ops.cache_slots import assign_cache_slots_
from torchrec_mpe.ops.cache_tensors import WAYS, CacheCounter, CacheDirectory, RowMoves, empty_directory
from torchrec_mpe.ops.reference.lookup_counts import LARGEST, decode_counts, encode_count

Result = tuple[Tensor, list[RowMoves], list[int]]


@dataclass
class Table:
    rows: int
    sets: int
    spill: int
    lfu: bool
    first_row: int = 0
    seed: int = 1


def assign(
    tables: Sequence[Table],
    directories: Sequence[CacheDirectory],
    ids: Sequence[Sequence[int]],
    batch: int,
    oldest: int | None = None,
    *,
    dirty: bool = True,
    dtype: torch.dtype = torch.int64,
) -> Result:
    return assign_cache_slots_(
        directories,
        torch.tensor([i for of_table in ids for i in of_table], dtype=dtype),
        [len(of_table) for of_table in ids],
        [t.rows for t in tables],
        [t.sets for t in tables],
        [t.first_row for t in tables],
        [t.seed for t in tables],
        batch,
        batch if oldest is None else oldest,
        dirty,
    )


def directories_of(tables: Sequence[Table]) -> list[CacheDirectory]:
    return [empty_directory(t.rows, t.sets, t.spill, lfu=t.lfu) for t in tables]


def assert_equal(expected: Result, got: Result) -> None:
    assert torch.equal(expected[0], got[0]) and expected[0].dtype == got[0].dtype
    assert list(expected[2]) == list(got[2]) and len(expected[1]) == len(got[1])
    for of_expected, of_got in zip(expected[1], got[1], strict=True):
        for a, b in zip(of_expected, of_got, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype == torch.int32


@st.composite
def tables_and_batches(draw: st.DrawFn) -> tuple[list[Table], list[tuple[list[list[int]], int, int, bool]]]:
    tables = draw(
        st.lists(
            st.builds(
                Table,
                rows=st.sampled_from([1, 5, 60, 400, 3000]),
                sets=st.sampled_from([1, 2, 3, 7]),
                spill=st.sampled_from([0, 4, 40, 200]),
                lfu=st.booleans(),
                first_row=st.sampled_from([0, 7, 2**32 - 3]),
                seed=st.integers(0, 2**63 - 1),
            ),
            min_size=1,
            max_size=3,
        )
    )
    random = draw(st.randoms(use_true_random=False))
    batches, number = [], 0
    for _ in range(draw(st.integers(1, 8))):
        number += draw(st.integers(1, 3))
        in_flight = draw(st.integers(0, 4))
        skew, most = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([0, 30, 150]))
        ids = [[int(t.rows * random.random() ** skew) for _ in range(random.randint(0, most))] for t in tables]
        batches.append((ids, number, max(0, number - in_flight), draw(st.booleans())))
    return tables, batches


@settings(max_examples=150, deadline=None)
@given(tables_and_batches(), st.sampled_from([torch.int32, torch.int64]))
def test_all_backends_assign_the_same(
    case: tuple[list[Table], list[tuple[list[list[int]], int, int, bool]]], dtype: torch.dtype
) -> None:
    tables, batches = case
    directories = {backend: directories_of(tables) for backend in FAST}
    for ids, batch, oldest, dirty in batches:
        results = {}
        for backend in FAST:
            with on(backend):
                results[backend] = assign(tables, directories[backend], ids, batch, oldest, dirty=dirty, dtype=dtype)
        for backend in CPU:
            assert_equal(results["reference"], results[backend])
            for a, b in zip(directories["reference"], directories[backend], strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), backend


@pytest.mark.parametrize("lfu", [False, True])
def test_all_backends_assign_the_same_in_larger_tables(lfu: bool) -> None:
    tables = [Table(100_000, 20, 3000, lfu, seed=5), Table(3000, 30, 3000, lfu), Table(50, 1, 60, lfu)]
    directories = {backend: directories_of(tables) for backend in FAST}
    g = torch.Generator().manual_seed(0)
    for batch in range(1, 5):
        skewed = [(t.rows * torch.rand(1300, generator=g) ** 3).long().tolist() for t in tables]
        results = {}
        for backend in FAST:
            with on(backend):
                results[backend] = assign(tables, directories[backend], skewed, batch, batch - batch % 2)
        assert results["reference"][1] and max(len(m.fetched_rows) for m in results["reference"][1]) > 600
        for backend in CPU:
            assert_equal(results["reference"], results[backend])
            for a, b in zip(directories["reference"], directories[backend], strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), backend


@pytest.mark.parametrize("backend", FAST)
def test_least_recently_used_row_gives_way(backend: str) -> None:
    table = Table(rows=1000, sets=2, spill=5, lfu=False)
    [directory] = directories_of([table])
    with on(backend):
        slots, [moves], needed = assign([table], [directory], [list(range(64))], 1)
        assert slots.tolist() == [WAYS * (row % 2) + row // 2 for row in range(64)] and needed == [5]
        assert moves.written_rows.tolist() == [] and moves.fetched_rows.tolist() == list(range(64))
        _, [moves], _ = assign([table], [directory], [[row for row in range(64) if row not in (3, 10, 12)]], 2)
        assert not len(moves.fetched_rows)
        slots, [moves], _ = assign([table], [directory], [[500, 701, 500, 502]], 3, dirty=False)
    assert slots.tolist() == [5, WAYS + 1, 5, 6]
    assert moves.written_slots.tolist() == moves.fetched_slots.tolist() == [5, WAYS + 1, 6]
    assert moves.written_rows.tolist() == [10, 3, 12] and moves.fetched_rows.tolist() == [500, 701, 502]
    assert directory.slot_dirty.sum() == 61  # of the 64 rows; the three new ones are not going to be updated
    counters = {name: number for name, number in vars(CacheCounter).items() if name.isupper()}
    counted = {name: int(directory.statistics[k]) for name, k in counters.items()}
    assert counted == {
        "CALLS": 3, "REQUESTED": 64 + 61 + 4, "UNIQUE": 64 + 61 + 3, "UNIQUE_MISSES": 67,
        "CONFLICT_UNIQUE_MISSES": 0, "EVICTIONS": 3,
    }  # fmt: skip


@pytest.mark.parametrize("backend", FAST)
def test_rows_in_flight_stay_and_clean_rows_are_not_written(backend: str) -> None:
    table = Table(rows=1000, sets=1, spill=40, lfu=False)
    [directory] = directories_of([table])
    with on(backend):
        assign([table], [directory], [list(range(32))], 1)
        slots, [moves], _ = assign([table], [directory], [list(range(100, 110))], 2, oldest=1, dirty=False)
        assert slots.tolist() == list(range(32, 42)) and not len(moves.written_rows)
        # Batch 1 is done: 105, in the spill area, stays for batch 3; the others of batch 2 do if it is in flight.
        slots, [moves], _ = assign([table], [directory], [[105, 200]], 3, oldest=2)
        assert slots.tolist() == [37, 0] and moves.written_rows.tolist() == [0]
        slots, [moves], _ = assign([table], [directory], [[300]], 4, oldest=4)
    assert slots.tolist() == [1]
    # 105 became dirty with batch 3, the other spilled rows are clean and vanish.
    assert moves.written_rows.tolist() == [105, 1] and moves.written_slots.tolist() == [37, 1]
    assert (directory.slot_rows[32:] == -1).all()


@pytest.mark.parametrize("backend", FAST)
def test_row_that_is_colder_than_its_set_is_spilled(backend: str) -> None:
    table = Table(rows=1000, sets=1, spill=4, lfu=True)
    [directory] = directories_of([table])
    with on(backend):
        assign([table], [directory], [[row for row in range(32) for _ in range(2 + (row != 9))]], 1)
        slots, [moves], _ = assign([table], [directory], [[100]], 2)
        assert slots.tolist() == [32] and not len(moves.written_rows)
        slots, [moves], _ = assign([table], [directory], [[101, 100]], 3)  # the second lookup of 100
        assert slots.tolist() == [33, 32]
        slots, [moves], _ = assign([table], [directory], [[100]], 4)
        assert slots.tolist() == [32] and moves.written_rows.tolist() == [101]
        slots, [moves], _ = assign([table], [directory], [[]], 5)
        assert moves.written_rows.tolist() == [100] and directory.row_counts[100] == 3
        slots, [moves], _ = assign([table], [directory], [[101]], 6)  # as often as 9 was
    assert slots.tolist() == [9] and moves.written_rows.tolist() == [9] and directory.row_counts[9] == 2


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("lfu", [False, True])
def test_too_small_a_spill_area_changes_nothing(backend: str, lfu: bool) -> None:
    tables = [Table(1000, 1, 50, lfu), Table(1000, 1, 3, lfu), Table(1000, 4, 0, lfu)]
    directories = directories_of(tables)
    with on(backend):
        assign(tables, directories, [list(range(40)), list(range(33)), list(range(128))], 1)
        before = [[field.clone() for field in directory] for directory in directories]
        ids = [list(range(20, 60)), [7, *range(100, 140), *range(5)], list(range(100, 140))]
        slots, moves, needed = assign(tables, directories, ids, 2, oldest=2)
        assert slots.tolist() == [] and moves == [] and slots.dtype == torch.int64
        # Of table 1: 6 hits; one row comes back from its spill area, 26 of 40 find victims.
        assert needed == [50, 14, 0]
        for directory, fields in zip(directories, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(directory, fields, strict=True))
        larger = [*tables[:1], Table(1000, 1, 14, lfu), *tables[2:]]
        directories[1] = directories_of(larger)[1]
        for ours, theirs in zip(directories[1], before[1], strict=True):
            ours[: len(theirs)] = theirs
        slots, moves, needed = assign(larger, directories, ids, 2, oldest=2)
    assert len(slots) == sum(map(len, ids)) and needed == [50, 14, 0]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        *((bad, dtype) for bad in (-1, 40, 2**31 - 1, -(2**31)) for dtype in (torch.int32, torch.int64)),
        (2**40, torch.int64),
        (-(2**63), torch.int64),
    ],
)
def test_ids_that_are_no_rows_change_nothing(backend: str, bad: int, dtype: torch.dtype) -> None:
    tables = [Table(1000, 1, 50, True), Table(40, 1, 50, True)]
    directories = directories_of(tables)
    before = [[field.clone() for field in directory] for directory in directories]
    with on(backend), pytest.raises(IndexError, match=rf"table 1 has 40 rows, got the id {bad}\b"):
        assign(tables, directories, [[999, 5], [3, bad, 41]], 1, dtype=dtype)
    for directory, fields in zip(directories, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(directory, fields, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_a_million_lookups_of_one_row(backend: str) -> None:
    table = Table(rows=10, sets=1, spill=0, lfu=True)
    [directory] = directories_of([table])
    ids = torch.full((1_000_000 if backend != "reference" else 1000,), 7)
    with on(backend):
        slots, [moves], _ = assign_cache_slots_([directory], ids, [len(ids)], [10], [1], [0], [1], 1, 1, True)
    assert not slots.any() and moves.fetched_rows.tolist() == [7]
    count = int(decode_counts(directory.slot_counts[0]))
    assert abs(count - min(len(ids), LARGEST)) < len(ids) / 16
    assert directory.statistics.tolist() == [1, len(ids), 1, 1, 0, 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_assigns_the_same(threads: int) -> None:
    tables = [Table(20_000, 5 + k, 3000, k % 2 == 0, seed=k) for k in range(5)]
    g = torch.Generator().manual_seed(1)
    batches = [[(t.rows * torch.rand(500, generator=g) ** 3).long().tolist() for t in tables] for _ in range(4)]
    results = []
    before = torch.get_num_threads()
    for number in (1, threads):
        torch.set_num_threads(number)
        try:
            directories = directories_of(tables)
            results.append([assign(tables, directories, ids, k + 1, k) for k, ids in enumerate(batches)])
        finally:
            torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert_equal(one, several)


@pytest.mark.parametrize("backend", FAST)
def test_counts_of_lookups_are_unbiased(backend: str) -> None:
    rows, batches, lookups = 32, 40, 25
    table = Table(rows, 1, 0, True)
    [directory] = directories_of([table])
    ids = [row for row in range(rows) for _ in range(lookups)]
    with on(backend):
        for batch in range(1, batches + 1):
            assign([table], [directory], [ids], batch)
    counts = decode_counts(directory.slot_counts).double()
    # Steps are at most a 16th of the count, 62; a rounding deviates by at most half of one, 40 of them by 196 at most,
    # the mean of 32 rows by 35: here 3 of these deviations.
    assert abs(counts.mean() - batches * lookups) < 105
    assert len(counts.unique()) > 1


def test_a_count_is_rounded_to_its_neighbours_in_proportion() -> None:
    for count in [1, 31, 33, 100, 12_345, LARGEST - 1, LARGEST + 5]:
        sample = torch.randint(2**32, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
        coded = decode_counts(torch.tensor([encode_count(count, noise) for noise in sample])).double()
        step = max(1, 2 ** (min(count, LARGEST).bit_length() - 5))
        assert ((coded - min(count, LARGEST)).abs() <= step).all()
        assert abs(coded.mean() - min(count, LARGEST)) <= 6 * step / 2 / 4000**0.5


def test_misuse() -> None:
    table = Table(40, 1, 5, False)
    directories = directories_of([table])
    ids = torch.arange(3)

    def call(
        ids: Tensor = ids, per_table: Sequence[int] = (3,), sets: int = 1, batch: int = 1, oldest: int = 1
    ) -> Result:
        return assign_cache_slots_(directories, ids, per_table, [40], [sets], [0], [1], batch, oldest, True)

    with pytest.raises(TypeError, match=r"ids must be int32 or int64, got torch.float32"):
        call(ids.float())
    with pytest.raises(ValueError, match=r"ids \[3\] are not of \[4\]"):
        call(per_table=[4])
    with pytest.raises(ValueError, match="1 tables need as many ids_per_table, got 2"):
        call(per_table=[2, 1])
    for sets in (0, 2):
        with pytest.raises(ValueError, match=f"table 0 has {sets} sets of 32 slots, but 37 slots"):
            call(sets=sets)
    for batch, oldest in ((1, 2), (2**31, 1), (1, -1)):
        with pytest.raises(ValueError, match=f"batch {batch} and the oldest in flight {oldest}"):
            call(batch=batch, oldest=oldest)
    assert (directories[0].slot_rows == -1).all()


@pytest.mark.skipif(not library.is_loaded(), reason="the operators are not built")
def test_what_does_not_fit_is_refused_by_the_op_too() -> None:
    op = torch.ops.torchrec_mpe.assign_cache_slots_
    directory = empty_directory(100, 1, 5, lfu=True)

    def call(ids: Tensor | None = None, num_rows: int = 100, fields: dict[str, Tensor] | None = None) -> None:
        lists = [[{**directory._asdict(), **(fields or {})}[name]] for name in directory._fields]
        op(*lists, torch.tensor([3, 99]) if ids is None else ids, [2], [num_rows], [1], [0], [1], 1, 1, True)

    for name, field in zip(directory._fields, directory, strict=True):
        with pytest.raises((TypeError, ValueError), match="table 0"):
            call(fields={name: field[:-1]})
        with pytest.raises(TypeError, match=f"table 0: {name} must be"):
            call(fields={name: field.float()})
        with pytest.raises(ValueError, match=f"table 0: {name} must be"):
            call(fields={name: field.repeat(2)[::2]})
    with pytest.raises(ValueError, match=r"row_counts must be \[101\]"):
        call(num_rows=101)
    with pytest.raises(ValueError, match="2147483648 rows"):
        call(num_rows=2**31)
    with pytest.raises(IndexError, match="table 0 has 100 rows, got the id 100"):
        call(torch.tensor([1, 100]))
    assert (directory.slot_rows == -1).all()


@pytest.mark.skipif(not library.is_loaded(), reason="the operators are not built")
@pytest.mark.parametrize("backend", CPU)
def test_a_directory_with_rows_that_are_none_is_refused(backend: str) -> None:
    table = Table(100, 1, 5, True)
    [directory] = directories_of([table])
    directory.slot_rows[:32] = torch.arange(200, 232, dtype=torch.int32)
    before = [field.clone() for field in directory]
    with on(backend), pytest.raises(ValueError, match="table 0 has 100 rows, but its slot 0 the row 200"):
        assign([table], [directory], [[5, 5]], 1)
    assert all(torch.equal(a, b) for a, b in zip(directory, before, strict=True))


@pytest.mark.skipif(not library.is_loaded(), reason="the operators are not built")
def test_op_is_registered_as_torch_wants() -> None:
    lists = [[field] for field in empty_directory(100, 1, 5, lfu=True)]
    arguments = (*lists, torch.tensor([3, 99]), [2], [100], [1], [0], [1], 1, 1, True)
    # Not under AOT autograd, which takes no op that changes tensors and also returns lists.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.torchrec_mpe.assign_cache_slots_.default, arguments, test_utils=checks)
