"""Assigning cache slots on Triton against the reference: slots, moves and directories are equal, batch after batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from torchrec_mpe.ops import triton_backend
from torchrec_mpe.ops.cache_tensors import WAYS, CacheCounter, CacheDirectory, empty_directory
from torchrec_mpe.ops.reference import cache_slots as reference
from torchrec_mpe.ops.reference.lookup_counts import LARGEST, decode_counts, encode_count
from torchrec_mpe.ops.reference.philox import philox
from torchrec_mpe.ops.triton import cache_slots
from torchrec_mpe.ops.triton.lookup_counts import add_lookups


class Caches:
    """Directories of tables, held twice, which see the same batches."""

    def __init__(
        self,
        device: torch.device,
        num_rows: Sequence[int],
        num_sets: Sequence[int],
        spill: Sequence[int],
        lfu: Sequence[bool],
        seed: int = 0,
    ) -> None:
        self.device, self.num_rows, self.num_sets = device, list(num_rows), list(num_sets)
        g = torch.Generator().manual_seed(seed)
        self.theirs = [
            empty_directory(*sizes, lfu=is_lfu) for *sizes, is_lfu in zip(num_rows, num_sets, spill, lfu, strict=True)
        ]
        for directory in self.theirs:  # large counts are rounded
            directory.row_counts.copy_(torch.randint(0, 120, directory.row_counts.shape, generator=g))
        self.ours = [CacheDirectory(*(tensor.to(device, copy=True) for tensor in d)) for d in self.theirs]
        self.seeds = torch.randint(2**62, (len(num_rows),), generator=g).tolist()
        self.generator = g

    def look_up(self, ids: Sequence[Tensor], batch: int, oldest_in_flight: int, dirty: bool) -> Any:
        """What both returned, which is equal."""
        together = torch.cat(list(ids))
        first_rows = [7 + 2**33 * t for t in range(len(ids))]
        arguments = self.num_rows, self.num_sets, first_rows, self.seeds, batch, oldest_in_flight, dirty
        lengths = [len(part) for part in ids]
        theirs = reference.assign_cache_slots_(self.theirs, together, lengths, *arguments)
        ours = cache_slots.assign_cache_slots_(self.ours, together.to(self.device), lengths, *arguments)
        assert ours[0].dtype == together.dtype
        assert ours[0].tolist() == theirs[0].tolist()
        assert ours[2] == theirs[2]
        assert [[tensor.tolist() for tensor in moves] for moves in ours[1]] == [
            [tensor.tolist() for tensor in moves] for moves in theirs[1]
        ]
        assert all(tensor.dtype == torch.int32 for moves in ours[1] for tensor in moves)
        self.check_equal()
        return theirs

    def check_equal(self) -> None:
        for t, (ours, theirs) in enumerate(zip(self.ours, self.theirs, strict=True)):
            for name, a, b in zip(ours._fields, ours, theirs, strict=True):
                assert a.dtype == b.dtype
                assert a.tolist() == b.tolist(), (t, name)

    def random_ids(self, count: int, skew: float = 3.0, dtype: torch.dtype = torch.int64) -> list[Tensor]:
        """Some ids of every table, small ones more often."""
        uniform = [torch.rand(count, generator=self.generator, dtype=torch.float64) for _ in self.num_rows]
        return [(u**skew * rows).to(dtype) for u, rows in zip(uniform, self.num_rows, strict=True)]

    def statistics(self, counter: int) -> int:
        return sum(int(d.statistics[counter]) for d in self.theirs)


@pytest.mark.parametrize(("in_flight", "dtype"), [(1, torch.int32), (3, torch.int64)])
@pytest.mark.parametrize("lfu", [[False, False], [True, True], [False, True]])
def test_many_batches(lfu: list[bool], in_flight: int, dtype: torch.dtype, device: torch.device) -> None:
    caches = Caches(device, (300, 200), (2, 1), (150, 100), lfu, seed=in_flight)
    written = 0
    for batch in range(1, 7):
        ids = caches.random_ids(50, dtype=dtype)
        _, moves, _ = caches.look_up(ids, batch, max(1, batch + 1 - in_flight), dirty=batch % 3 != 0)
        written += sum(len(m.written_rows) for m in moves)
    assert written > 0
    assert caches.statistics(CacheCounter.EVICTIONS) > 0
    assert caches.statistics(CacheCounter.CONFLICT_UNIQUE_MISSES) > 0


@pytest.mark.parametrize("lfu", [True, False])
def test_a_cache_that_holds_every_row_evicts_none(lfu: bool, device: torch.device) -> None:
    caches = Caches(device, [320], [10], [5], [lfu])
    for batch in range(1, 5):
        caches.look_up(caches.random_ids(200, skew=1.0), batch, batch, dirty=True)
    assert caches.statistics(CacheCounter.EVICTIONS) == caches.statistics(CacheCounter.CONFLICT_UNIQUE_MISSES) == 0


@pytest.mark.parametrize("lfu", [True, False])
def test_nothing_changes_if_the_spill_area_of_a_table_is_too_small(lfu: bool, device: torch.device) -> None:
    caches = Caches(device, [400, 400], [1, 1], [30, 8], [lfu, lfu])
    caches.look_up([torch.arange(40), torch.arange(35)], 1, 1, dirty=True)
    before = [[tensor.clone() for tensor in d] for d in caches.ours]
    slots, moves, needed = caches.look_up([torch.arange(60), torch.arange(80)], 2, 1, dirty=True)
    assert len(slots) == 0
    assert moves == []
    assert needed[0] == 30
    assert needed[1] > 8
    for old, new in zip(before, caches.ours, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    caches.look_up([torch.arange(60), torch.arange(20, 30)], 2, 1, dirty=True)


def test_spilled_rows_are_found_locked_and_freed(device: torch.device) -> None:
    caches = Caches(device, [1000], [1], [40], [False])
    caches.look_up([torch.arange(60)], 1, 1, dirty=True)
    # Rows from 32 on are spilled; of those, 40 to 50 are looked up again and stay, the others are freed and taken.
    locations, (moves,), _ = caches.look_up([torch.arange(40, 90)], 2, 2, dirty=False)
    assert set(range(32, 40)) | set(range(50, 60)) != set(moves.written_rows.tolist())
    assert int(locations[0]) == WAYS + 8
    caches.look_up([torch.zeros(0, dtype=torch.int64)], 3, 3, dirty=False)
    caches.look_up([torch.arange(0, 900, 100)], 4, 3, dirty=True)


def test_no_ids_no_spill_area_and_no_tables(device: torch.device) -> None:
    caches = Caches(device, [50, 40, 60], [1, 2, 1], [0, 3, 0], [True, False, False])
    none = torch.zeros(0, dtype=torch.int64)
    caches.look_up([none, none, none], 1, 1, dirty=True)
    caches.look_up([none, torch.tensor([3, 3, 39]), torch.tensor([59])], 2, 2, dirty=True)
    caches.look_up([torch.tensor([49]), none, none], 3, 3, dirty=True)
    assert Caches(device, [50], [1], [0], [False]).look_up([torch.arange(33)], 1, 1, dirty=True)[2] == [1]
    assert cache_slots.assign_cache_slots_([], none.to(device), [], [], [], [], [], 1, 1, True)[1:] == ([], [])


def test_one_row_a_thousand_times(device: torch.device) -> None:
    caches = Caches(device, [50], [1], [0], [True])
    for batch in range(1, 3):
        caches.look_up([torch.full((1000,), 3)], batch, batch, dirty=True)


def test_more_sets_than_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_slots, "_PROGRAMS", 3)
    caches = Caches(device, [2000], [7], [100], [True])
    for batch in range(1, 4):
        caches.look_up(caches.random_ids(150, skew=1.0), batch, batch, dirty=True)


@pytest.mark.parametrize("bad", [-1, 40, 2**31, 2**40, -(2**40)])
def test_bad_ids_name_their_table_and_change_nothing(bad: int, device: torch.device) -> None:
    caches = Caches(device, [50, 40], [1, 1], [3, 3], [True, True])
    ids = torch.tensor([1, 45, 0, bad, 39, 41])
    arguments = [2, 4], [50, 40], [1, 1], [0, 0], [0, 0], 1, 1, True
    with pytest.raises(IndexError, match=f"table 1 has 40 rows, got the id {bad}$"):
        cache_slots.assign_cache_slots_(caches.ours, ids.to(device), *arguments)
    caches.check_equal()


def test_directories_that_do_not_fit_are_refused(device: torch.device) -> None:
    (directory,) = Caches(device, [50], [1], [3], [True]).ours
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="table 0 has 35 slots for 2 sets of 32"):
        cache_slots.assign_cache_slots_([directory], ids, [1], [50], [2], [0], [0], 1, 1, True)
    with pytest.raises(ValueError, match="table 0: row_counts must have 60 elements, not 50"):
        cache_slots.assign_cache_slots_([directory], ids, [1], [60], [1], [0], [0], 1, 1, True)
    with pytest.raises(ValueError, match=r"ids are 1, but \[2\] for each table"):
        cache_slots.assign_cache_slots_([directory], ids, [2], [50], [1], [0], [0], 1, 1, True)
    wrong = directory._replace(slot_rows=directory.slot_rows.long())
    with pytest.raises(TypeError, match=r"table 0: slot_rows must be torch.int32"):
        cache_slots.assign_cache_slots_([wrong], ids, [1], [50], [1], [0], [0], 1, 1, True)


def test_as_the_dispatcher_calls_them(device: torch.device) -> None:
    caches = Caches(device, [50, 40], [1, 1], [3, 30], [False, True])
    ids = torch.tensor([*range(35), *range(39)])
    arguments = [35, 39], caches.num_rows, caches.num_sets, [0, 0], caches.seeds, 1, 1, True
    flat = [[d[k] for d in caches.ours] for k in range(6)]
    slots, moves, needed = triton_backend.CUDA_CACHE["assign_cache_slots_"](*flat, ids.to(device), *arguments)
    expected = reference.assign_cache_slots_(caches.theirs, ids, *arguments)
    assert slots.tolist() == expected[0].tolist()
    assert [m.tolist() for m in moves] == [tensor.tolist() for of_table in expected[1] for tensor in of_table]
    assert needed == expected[2]
    caches.check_equal()


def test_counts_round_as_the_reference(device: torch.device) -> None:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["batch"])
    def kernel(byte, lookups, row, out, batch, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        i = tl.arange(0, SIZE)
        count = add_lookups(tl.load(byte + i).to(tl.int32), tl.load(lookups + i), tl.load(row + i), batch, 987654321098)
        tl.store(out + i, count.to(tl.uint8))

    size = 1024
    g = torch.Generator().manual_seed(1)
    byte = torch.arange(size).remainder(256).to(torch.uint8)
    lookups = (2 ** (torch.rand(size, generator=g) * 20)).int()
    lookups[-1] = 2**31 - 1
    row = torch.randint(2**40, (size,), generator=g)
    out = torch.empty_like(byte, device=device)
    kernel[(1,)](byte.to(device), lookups.to(device), row.to(device), out, 5, SIZE=size)
    words = row & 0xFFFFFFFF, torch.full_like(row, 5), torch.zeros_like(row), 2 + 256 * (row >> 32)
    noise = philox(words, 987654321098)[0]
    counts = (decode_counts(byte) + lookups).clamp(max=LARGEST)
    expected = [encode_count(count, n) for count, n in zip(counts.tolist(), noise.tolist(), strict=True)]
    assert out.tolist() == expected
