"""Slots of a cache for the rows of a batch: all tables at once, and one wait for the device.

What changes is worked out first, in tensors of their own with an element for each id. That of the position where the
batch first names a row stands for the row, so prefix sums over positions are in the order of first occurrence. Then the
host reads how much there is to do, and whether the spill areas are large enough; only then do directories change.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from torchrec_mpe.ops.cache_tensors import WAYS, CacheDirectory, RowMoves
from torchrec_mpe.ops.triton.device import check_device
from torchrec_mpe.ops.triton.lookup_counts import add_lookups
from torchrec_mpe.ops.triton.table_fields import check, on_device, pointer
from torchrec_mpe.upstream.tensors import add_each_

_WAYS = tl.constexpr(WAYS)
# The fields of a table: addresses of its directory, ...
_SLOT_ROWS, _SLOT_BATCHES, _SLOT_DIRTY, _SLOT_COUNTS, _ROW_COUNTS = (tl.constexpr(i) for i in range(5))
# ... whether it has counts, its sets and the number of the first through all tables, what to add to a spill slot's
# number through all tables, ...
_LFU, _SETS, _FIRST_SET, _SPILL_SHIFT, _NUM_ROWS, _FIRST_ROW, _SEED = (tl.constexpr(i) for i in range(5, 12))
# ... and where its ids and its spill slots start; where they end is the same field of the line after.
_FIRST_ID, _FIRST_SPILL, _FIELDS = (tl.constexpr(i) for i in range(12, 15))

# Flags of every id, whose prefix sums follow each other.
_IS_FIRST, _IS_MISSING, _IS_SPILLED, _EVICTS, _WRITES, _IS_BAD = (tl.constexpr(i) for i in range(6))
# And of every spill slot.
_IS_FREE, _IS_WRITTEN = (tl.constexpr(i) for i in range(2))

_NO_SET = tl.constexpr(2**31 - 1)
_TAKEN = tl.constexpr(2**62)
_EMPTY = tl.constexpr(-(2**62))  # a multiple of WAYS
_DTYPES = (torch.int32, torch.int32, torch.uint8, torch.uint8, torch.uint8, torch.int64)  # of a directory
_PROBE_BLOCK = 32  # of which every element reads a set
_BLOCK = 128
_PROGRAMS = 2048  # at most, which then take the sets in turn


@triton.jit(do_not_specialize=["batch", "num_ids"])
def _probe_kernel(
    tables,
    table_of_id,
    rows,
    multiplicity,
    slots,
    missing_sets,
    new_counts,
    hit_ways,
    batch,
    num_ids,
    LFU: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Look rows up in their sets; ``slots`` has those that were found in the spill area, else -1."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lookups = tl.load(multiplicity + position, mask=position < num_ids, other=0)
    live = lookups > 0
    fields = tables + tl.load(table_of_id + position, mask=live, other=0) * _FIELDS
    row = tl.load(rows + position, mask=live, other=0)
    spill_slot = tl.load(slots + position, mask=live, other=-1)
    set_in_table = row % tl.load(fields + _SETS).to(tl.int32)
    set_of_all = set_in_table + tl.load(fields + _FIRST_SET).to(tl.int32)
    way = tl.arange(0, _WAYS)[None, :]
    held = pointer(fields, _SLOT_ROWS, tl.int32)[:, None] + (set_in_table * _WAYS)[:, None] + way
    is_way = tl.load(held, mask=live[:, None], other=-1) == row[:, None]
    hit_way = tl.max(tl.where(is_way, way, -1), axis=1)
    is_hit = live & (hit_way >= 0)
    tl.atomic_or(hit_ways + set_of_all, 1 << tl.maximum(hit_way, 0), mask=is_hit)
    slot = tl.where(is_hit, set_in_table * _WAYS + hit_way, spill_slot)
    is_missing = live & (slot < 0)
    tl.store(slots + position, slot, mask=live)
    tl.store(missing_sets + position, tl.where(is_missing, set_of_all, _NO_SET), mask=position < num_ids)
    if LFU:
        has_counts = tl.load(fields + _LFU) != 0
        of_slot = pointer(fields, _SLOT_COUNTS, tl.uint8) + slot
        of_row = pointer(fields, _ROW_COUNTS, tl.uint8) + row
        count = tl.load(of_slot, mask=has_counts & live & (slot >= 0), other=0).to(tl.int32)
        count += tl.load(of_row, mask=has_counts & is_missing, other=0).to(tl.int32)
        number = row.to(tl.int64) + tl.load(fields + _FIRST_ROW)
        count = add_lookups(count, lookups, number, batch, tl.load(fields + _SEED))
        tl.store(new_counts + position, count.to(tl.uint8), mask=has_counts & live)


@triton.jit(do_not_specialize=["oldest_in_flight", "num_ids"])
def _victim_kernel(
    tables,
    table_of_id,
    missing_sets,
    positions,
    new_counts,
    hit_ways,
    slots,
    evictions,
    oldest_in_flight,
    num_ids,
    LFU: tl.constexpr,  # noqa: N803
):
    """Deal with each set's missing rows one after the other; ``slots`` stays -1 for those that are to be spilled.

    Missing rows come in order of their sets, those of a set in order of first occurrence, ids that miss nothing last.
    ``evictions`` gets 1 for a row that evicts another, 2 if that one has to be written.
    """
    way = tl.arange(0, _WAYS)
    start = tl.program_id(0)
    this = tl.load(missing_sets + start, mask=start < num_ids, other=_NO_SET)
    while this != _NO_SET:
        before = tl.load(missing_sets + start - 1, mask=start > 0, other=-1)
        if before != this:
            fields = tables + tl.load(table_of_id + tl.load(positions + start)) * _FIELDS
            first_slot = (this - tl.load(fields + _FIRST_SET).to(tl.int32)) * _WAYS
            held_rows = tl.load(pointer(fields, _SLOT_ROWS, tl.int32) + first_slot + way)
            batches = tl.load(pointer(fields, _SLOT_BATCHES, tl.int32) + first_slot + way)
            # Empty slots first, then by count and batch; the lowest 5 bits are the way.
            order = (batches.to(tl.int64) + (1 << 31)) * _WAYS + way
            if LFU:
                counts = pointer(fields, _SLOT_COUNTS, tl.uint8) + first_slot + way
                has_counts = tl.load(fields + _LFU) != 0
                order += tl.load(counts, mask=has_counts & (way >= 0), other=0).to(tl.int64) << 37
            is_hit = ((tl.load(hit_ways + this) >> way) & 1) != 0
            order = tl.where(is_hit | (batches >= oldest_in_flight), _TAKEN, order)
            order = tl.where(held_rows < 0, way.to(tl.int64) + _EMPTY, order)
            coldest = tl.min(order, axis=0)
            place = start
            is_going = coldest < _TAKEN
            while is_going:
                position = tl.load(positions + place)
                is_admitted = is_going
                if LFU:
                    is_admitted = (coldest >> 37) <= tl.load(new_counts + position).to(tl.int64)
                slot = first_slot + (coldest & (_WAYS - 1)).to(tl.int32)
                evicted = (coldest >= 0).to(tl.int8)
                evicted += evicted * (tl.load(pointer(fields, _SLOT_DIRTY, tl.uint8) + slot) != 0).to(tl.int8)
                tl.store(slots + position, slot, mask=is_admitted)
                tl.store(evictions + position, evicted, mask=is_admitted)
                order = tl.where((order == coldest) & is_admitted, _TAKEN, order)
                coldest = tl.min(order, axis=0)
                place += 1
                after = tl.load(missing_sets + place, mask=place < num_ids, other=_NO_SET)
                is_going = (coldest < _TAKEN) & (after == this)
        start += tl.num_programs(0)
        this = tl.load(missing_sets + start, mask=start < num_ids, other=_NO_SET)


@triton.jit
def _flag(sums, size, FLAG: tl.constexpr, place, mask):  # noqa: N803
    """Whether elements have a flag, and how many have it before them."""
    here = sums + tl.cast(FLAG, tl.int64) * size + place
    before = tl.load(here, mask=mask, other=0)
    after = tl.load(here + 1, mask=mask, other=0)
    return mask & (after > before), before - tl.load(sums + tl.cast(FLAG, tl.int64) * size)


@triton.jit
def _sum_before(sums, size, FLAG: tl.constexpr, place):  # noqa: N803
    """How many elements before a place have a flag."""
    first = sums + tl.cast(FLAG, tl.int64) * size
    return tl.load(first + place) - tl.load(first)


@triton.jit
def _keep_count(fields, slot, row, mask):
    """Keep the counts of rows that leave their slots."""
    mask &= (tl.load(fields + _LFU) != 0) & (row < tl.load(fields + _NUM_ROWS))
    count = tl.load(pointer(fields, _SLOT_COUNTS, tl.uint8) + slot, mask=mask, other=0)
    tl.store(pointer(fields, _ROW_COUNTS, tl.uint8) + row, count, mask=mask)


@triton.jit(do_not_specialize=["num_spill", "num_ids"])
def _empty_spill_kernel(
    tables,
    table_of_slot,
    sums,
    id_sums,
    free_slots,
    written_slots,
    written_rows,
    num_spill,
    num_ids,
    LFU: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Empty the spill slots that no batch waits for, and list the empty ones."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_spill
    fields = tables + tl.load(table_of_slot + place, mask=mask, other=0) * _FIELDS
    slot = place + tl.load(fields + _SPILL_SHIFT).to(tl.int32)
    is_free, rank = _flag(sums, num_spill, _IS_FREE, place, mask)
    tl.store(free_slots + rank, slot, mask=is_free)
    held = pointer(fields, _SLOT_ROWS, tl.int32) + slot
    row = tl.load(held, mask=is_free, other=-1)
    is_held = row >= 0
    is_written, written = _flag(sums, num_spill, _IS_WRITTEN, place, mask)
    # A table's moves follow those of the tables before.
    written += _sum_before(id_sums, num_ids, _WRITES, tl.load(fields + _FIRST_ID))
    tl.store(written_slots + written, slot, mask=is_written)
    tl.store(written_rows + written, row, mask=is_written)
    if LFU:
        _keep_count(fields, slot, row, is_held)
    tl.debug_barrier()  # all is read that changes now
    tl.store(held, tl.full([BLOCK], -1, tl.int32), mask=is_held)
    tl.store(pointer(fields, _SLOT_DIRTY, tl.uint8) + slot, tl.zeros([BLOCK], tl.uint8), mask=is_held)
    if LFU:
        has_counts = tl.load(fields + _LFU) != 0
        counts = pointer(fields, _SLOT_COUNTS, tl.uint8) + slot
        tl.store(counts, tl.zeros([BLOCK], tl.uint8), mask=is_held & has_counts)


@triton.jit(do_not_specialize=["batch", "num_ids", "num_spill"])
def _fill_kernel(
    tables,
    table_of_id,
    rows,
    slots,
    new_counts,
    sums,
    spill_sums,
    free_slots,
    written_slots,
    written_rows,
    fetched_slots,
    fetched_rows,
    batch,
    num_ids,
    num_spill,
    DIRTY: tl.constexpr,  # noqa: N803
    LFU: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Put the batch's rows into the directories."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = position < num_ids
    is_first, _ = _flag(sums, num_ids, _IS_FIRST, position, mask)
    fields = tables + tl.load(table_of_id + position, mask=is_first, other=0) * _FIELDS
    row = tl.load(rows + position, mask=is_first, other=0)
    slot = tl.load(slots + position, mask=is_first, other=0)

    is_spilled, rank = _flag(sums, num_ids, _IS_SPILLED, position, mask)
    rank -= _sum_before(sums, num_ids, _IS_SPILLED, tl.load(fields + _FIRST_ID))
    rank += _sum_before(spill_sums, num_spill, _IS_FREE, tl.load(fields + _FIRST_SPILL))
    slot = tl.where(is_spilled, tl.load(free_slots + rank, mask=is_spilled, other=0), slot)
    tl.store(slots + position, slot, mask=is_spilled)

    held = pointer(fields, _SLOT_ROWS, tl.int32) + slot
    is_missing, fetched = _flag(sums, num_ids, _IS_MISSING, position, mask)
    victim = tl.load(held, mask=is_missing, other=-1)
    is_written, written = _flag(sums, num_ids, _WRITES, position, mask)
    # A table's evictions follow what it and the tables before free of their spill areas.
    written += _sum_before(spill_sums, num_spill, _IS_WRITTEN, tl.load(fields + _FIELDS + _FIRST_SPILL))
    tl.store(written_slots + written, slot, mask=is_written)
    tl.store(written_rows + written, victim, mask=is_written)
    tl.store(fetched_slots + fetched, slot, mask=is_missing)
    tl.store(fetched_rows + fetched, row, mask=is_missing)
    if LFU:
        _keep_count(fields, slot, victim, victim >= 0)
    tl.debug_barrier()  # all is read that changes now
    tl.store(held, row, mask=is_missing)
    tl.store(pointer(fields, _SLOT_BATCHES, tl.int32) + slot, tl.zeros_like(row) + batch, mask=is_first)
    changes_dirty = is_missing
    if DIRTY:
        changes_dirty = is_first
    tl.store(pointer(fields, _SLOT_DIRTY, tl.uint8) + slot, tl.full([BLOCK], DIRTY, tl.uint8), mask=changes_dirty)
    if LFU:
        has_counts = tl.load(fields + _LFU) != 0
        count = tl.load(new_counts + position, mask=is_first & has_counts, other=0)
        tl.store(pointer(fields, _SLOT_COUNTS, tl.uint8) + slot, count, mask=is_first & has_counts)


def assign_cache_slots_(
    directories: Sequence[CacheDirectory],
    ids: Tensor,
    ids_per_table: Sequence[int],
    num_rows: Sequence[int],
    num_sets: Sequence[int],
    first_rows: Sequence[int],
    seeds: Sequence[int],
    batch: int,
    oldest_in_flight: int,
    dirty: bool,
) -> tuple[Tensor, list[RowMoves], list[int]]:
    """See :func:`torchrec_mpe.ops.cache_slots.assign_cache_slots_`.

    Waits for the device once, to know how many rows change place and whether the spill areas are large enough.

    Raises:
        IndexError: for an id that is no row of its table; nothing has changed then.
        ValueError: for CPU tensors outside Triton's interpreter, and if a directory's tensors do not fit together.
        TypeError: if a tensor is of another dtype.
    """
    if not directories:
        return torch.empty_like(ids), [], []
    check_device(ids)
    device, num_ids = ids.device, len(ids)
    if sum(ids_per_table) != num_ids:
        raise ValueError(f"ids are {num_ids}, but {list(ids_per_table)} for each table")
    spill_sizes = [len(d.slot_rows) - WAYS * sets for d, sets in zip(directories, num_sets, strict=True)]
    num_spill, lfu = sum(spill_sizes), any(d.is_lfu for d in directories)
    tables = on_device(_fields(directories, ids_per_table, num_rows, num_sets, first_rows, seeds, device), device)
    table_of_id = _tables(tables, _FIRST_ID.value, num_ids)
    bad = (ids < 0) | (ids >= tables[:, _NUM_ROWS.value][table_of_id])
    rows = ids.masked_fill(bad, 0).int()
    keys = table_of_id << 32 | rows
    first, multiplicity = _first_occurrences(keys)
    multiplicity.masked_fill_(bad, 0)

    table_of_spill = _tables(tables, _FIRST_SPILL.value, num_spill)
    spill_rows, spill_batches, spill_dirty = (
        torch.cat([d[k][WAYS * sets :] for d, sets in zip(directories, num_sets, strict=True)]) for k in range(3)
    )
    spill_keys = table_of_spill << 32 | spill_rows.long() & 0xFFFFFFFF  # with -1 no row's
    # One more, which stands for no slot.
    spill_keys, spill_place = torch.sort(functional.pad(spill_keys, (0, 1), value=len(directories) << 32))
    found = torch.searchsorted(spill_keys, keys)
    found = torch.where((multiplicity > 0) & (spill_keys[found] == keys), spill_place[found], num_spill)
    slots = torch.where(found < num_spill, found + tables[:, _SPILL_SHIFT.value][table_of_id], -1).int()
    is_free = (spill_rows < 0) | (spill_batches < oldest_in_flight)
    is_free &= torch.ones(num_spill + 1, dtype=torch.bool, device=device).scatter_(0, found, False)[:-1]

    missing_sets = torch.empty(num_ids, dtype=torch.int32, device=device)
    new_counts = torch.empty(num_ids if lfu else 0, dtype=torch.uint8, device=device)
    hit_ways = torch.zeros(sum(num_sets), dtype=torch.int32, device=device)
    evictions = torch.zeros(num_ids, dtype=torch.int8, device=device)
    _probe_kernel[_grid(num_ids, _PROBE_BLOCK)](
        tables,
        table_of_id,
        rows,
        multiplicity,
        slots,
        missing_sets,
        new_counts,
        hit_ways,
        batch,
        num_ids,
        LFU=lfu,
        BLOCK=_PROBE_BLOCK,
        num_warps=4,
    )
    is_missing = (multiplicity > 0) & (slots < 0)
    missing_sets, positions = torch.sort(missing_sets, stable=True)
    _victim_kernel[_grid(min(num_ids, _PROGRAMS), 1)](
        tables,
        table_of_id,
        missing_sets,
        positions,
        new_counts,
        hit_ways,
        slots,
        evictions,
        oldest_in_flight,
        num_ids,
        LFU=lfu,
        num_warps=1,
    )

    flags = [multiplicity > 0, is_missing, is_missing & (slots < 0), evictions > 0, evictions > 1, bad]
    sums, of_ids = _sums(flags, tables[:, _FIRST_ID.value])
    spill_flags = [is_free, is_free & (spill_rows >= 0) & (spill_dirty != 0)]
    spill_sums, of_spill = _sums(spill_flags, tables[:, _FIRST_SPILL.value])
    *counts, num_bad, num_free, num_emptied = torch.cat([of_ids, of_spill]).tolist()  # the wait for the device
    num_unique, num_missing, num_spilled, num_evictions, num_written = counts
    if any(num_bad):
        _raise_bad_id(ids, ids_per_table, num_rows, num_bad)
    needed = [
        size + max(0, spilled - free) for size, spilled, free in zip(spill_sizes, num_spilled, num_free, strict=True)
    ]
    if needed != spill_sizes:
        return ids.new_empty(0), [], needed

    written_sizes = [a + b for a, b in zip(num_emptied, num_written, strict=True)]
    written = torch.empty((2, sum(written_sizes)), dtype=torch.int32, device=device)
    fetched = torch.empty((2, sum(num_missing)), dtype=torch.int32, device=device)
    free_slots = torch.empty(sum(num_free), dtype=torch.int32, device=device)
    _empty_spill_kernel[_grid(num_spill, _BLOCK)](
        tables, table_of_spill, spill_sums, sums, free_slots, *written, num_spill, num_ids, LFU=lfu, BLOCK=_BLOCK
    )
    _fill_kernel[_grid(num_ids, _BLOCK)](
        tables,
        table_of_id,
        rows,
        slots,
        new_counts,
        sums,
        spill_sums,
        free_slots,
        *written,
        *fetched,
        batch,
        num_ids,
        num_spill,
        DIRTY=int(dirty),
        LFU=lfu,
        BLOCK=_BLOCK,
    )
    added = [
        [1, *of_table]
        for of_table in zip(ids_per_table, num_unique, num_missing, num_spilled, num_evictions, strict=True)
    ]
    add_each_([d.statistics for d in directories], on_device(added, device).unbind())
    moves = (part.split(sizes, 1) for part, sizes in ((written, written_sizes), (fetched, num_missing)))
    return slots[first].to(ids.dtype), [RowMoves(*w, *f) for w, f in zip(*moves, strict=True)], needed


def _tables(tables: Tensor, field: int, size: int) -> Tensor:
    """The table of each of some elements, int64 [size], of fields that say where each table's start."""
    return torch.repeat_interleave(tables[:, field].diff(), output_size=size)


def _first_occurrences(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Where each element's value first occurs, int64 [N]; there how often it occurs, int32 [N], 0 elsewhere."""
    in_order, place = torch.sort(keys, stable=True)
    start = torch.searchsorted(in_order, in_order)
    end = torch.searchsorted(in_order, in_order, right=True)
    first = torch.empty_like(place).scatter_(0, place, place[start])
    counts = torch.where(start == torch.arange(len(keys), device=keys.device), end - start, 0).int()
    return first, torch.empty_like(counts).scatter_(0, place, counts)


def _sums(flags: list[Tensor], starts: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix sums of F flags [N], one after the other, int32 [F * N + 1], and the sum of each table's, [F, T].

    One sum over all is much faster than F sums over lines.
    """
    sums = functional.pad(torch.cat(flags).cumsum(0, dtype=torch.int32), (1, 0))
    lines = torch.arange(len(flags), device=starts.device)[:, None] * len(flags[0])
    return sums, sums[lines + starts].diff(dim=1)


def _grid(size: int, block: int) -> tuple[int]:
    return (max(1, triton.cdiv(size, block)),)


def _fields(
    directories: Sequence[CacheDirectory],
    ids_per_table: Sequence[int],
    num_rows: Sequence[int],
    num_sets: Sequence[int],
    first_rows: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
) -> list[list[int]]:
    """The fields of T tables, all tensors checked, and a line more for where the last table ends."""
    lines = []
    first_id = first_set = first_spill = 0
    tables = zip(directories, ids_per_table, num_rows, num_sets, first_rows, seeds, strict=True)
    for t, (directory, ids, rows, sets, first_row, seed) in enumerate(tables):
        slots = len(directory.slot_rows)
        if sets < 1 or slots < WAYS * sets:
            raise ValueError(f"table {t} has {slots} slots for {sets} sets of {WAYS}")
        counts = (slots, rows) if directory.is_lfu else (0, 0)
        sizes = dict(zip(directory._fields, (slots, slots, slots, *counts, 6), strict=True))
        for (name, size), dtype, tensor in zip(sizes.items(), _DTYPES, directory, strict=True):
            check(tensor, dtype, f"table {t}: {name}")
            if len(tensor) != size:
                raise ValueError(f"table {t}: {name} must have {size} elements, not {len(tensor)}")
            if tensor.device != device:
                raise ValueError(f"table {t}: {name} must be on {device}, not on {tensor.device}")
        addresses = [tensor.data_ptr() for tensor in directory[:5]]
        of_table = [directory.is_lfu, sets, first_set, WAYS * sets - first_spill, rows, first_row, seed]
        lines.append([*addresses, *of_table, first_id, first_spill])
        first_id, first_set, first_spill = first_id + ids, first_set + sets, first_spill + slots - WAYS * sets
    return [*lines, [0] * (_FIELDS.value - 2) + [first_id, first_spill]]


def _raise_bad_id(ids: Tensor, ids_per_table: Sequence[int], num_rows: Sequence[int], num_bad: Sequence[int]) -> None:
    t = next(t for t, n in enumerate(num_bad) if n)
    of_table = ids.split(list(ids_per_table))[t]
    is_bad = (of_table < 0) | (of_table >= num_rows[t])
    raise IndexError(f"table {t} has {num_rows[t]} rows, got the id {int(of_table[is_bad][0])}")
