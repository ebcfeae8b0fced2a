"""Finding and assigning cache slots in pure Python: the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_mpe.ops.cache_tensors import WAYS, CacheCounter, CacheDirectory, RowMoves
from torchrec_mpe.ops.reference.lookup_counts import decode_counts, encode_count
from torchrec_mpe.ops.reference.philox import philox
from torchrec_mpe.ops.reference.stored_rows import STREAM_COUNTS


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
    """See :func:`torchrec_mpe.ops.assign_cache_slots_`."""
    locations = torch.empty_like(ids)
    tables: list[_Table] = []
    needed: list[int] = []
    for t, part in enumerate(ids.split(list(ids_per_table))):
        table = _Table(directories[t], num_rows[t], num_sets[t], first_rows[t], seeds[t], batch, oldest_in_flight)
        needed.append(table.look_up(part.tolist(), t))
        tables.append(table)
    spill = [len(d.slot_rows) - WAYS * sets for d, sets in zip(directories, num_sets, strict=True)]
    if any(n > s for n, s in zip(needed, spill, strict=True)):
        return locations[:0], [], needed
    moves = [table.commit(dirty) for table in tables]
    found = [slot for table in tables for slot in table.locations]
    locations.copy_(torch.tensor(found, dtype=ids.dtype).view(-1))
    return locations, moves, needed


class _Table:
    """One table's part of a call, worked out on copies until it is known that the spill area is large enough."""

    def __init__(
        self,
        directory: CacheDirectory,
        num_rows: int,
        sets: int,
        first_row: int,
        seed: int,
        batch: int,
        oldest_in_flight: int,
    ) -> None:
        self.directory = directory
        self.num_rows, self.sets, self.first_row, self.seed = num_rows, sets, first_row, seed
        self.batch, self.oldest_in_flight = batch, oldest_in_flight
        self.rows: list[int] = directory.slot_rows.tolist()
        self.batches: list[int] = directory.slot_batches.tolist()
        self.dirty: list[int] = directory.slot_dirty.tolist()
        self.counts: list[int] = directory.slot_counts.tolist()
        self.row_counts = directory.row_counts.clone()
        self.statistics: list[int] = directory.statistics.tolist()
        self.used: list[int] = []
        self.written: list[tuple[int, int]] = []
        self.fetched: list[tuple[int, int]] = []

    def look_up(self, ids: list[int], number: int) -> int:
        """Find or assign each id's slot; returns how many spill slots there have to be."""
        for row in ids:
            if not 0 <= row < self.num_rows:
                raise IndexError(f"table {number} has {self.num_rows} rows, got the id {row}")
        multiplicity: dict[int, int] = {}
        for row in ids:
            multiplicity[row] = multiplicity.get(row, 0) + 1
        slot_of = {row: slot for slot, row in enumerate(self.rows) if row >= 0}
        missing = [row for row in multiplicity if row not in slot_of]
        hits = [row for row in multiplicity if row in slot_of]
        for row in hits:
            slot = slot_of[row]
            self.batches[slot] = self.batch
            if self.directory.is_lfu:
                self.counts[slot] = self._count(self.counts[slot], row, multiplicity[row])
        first_spill = WAYS * self.sets
        # Spilled rows that no batch waits for go back to the store.
        for slot in range(first_spill, len(self.rows)):
            if self.rows[slot] >= 0 and self.batches[slot] < self.oldest_in_flight:
                self._empty(slot)
        free = [slot for slot in range(first_spill, len(self.rows)) if self.rows[slot] < 0]
        conflicts = evictions = 0
        for row in missing:
            count = 0
            if self.directory.is_lfu:
                count = self._count(int(self.row_counts[row]), row, multiplicity[row])
            slot = self._victim(row, count)
            if slot < 0:
                conflicts += 1
                slot = free.pop(0) if free else self._extend()
            elif self.rows[slot] >= 0:
                evictions += 1
                self._empty(slot)
            self.rows[slot], self.batches[slot], self.dirty[slot] = row, self.batch, 0
            if self.directory.is_lfu:
                self.counts[slot] = count
            self.fetched.append((slot, row))
            slot_of[row] = slot
        self.locations = [slot_of[row] for row in ids]
        self.used = [slot_of[row] for row in multiplicity]
        for counter, number_of in (
            (CacheCounter.CALLS, 1),
            (CacheCounter.REQUESTED, len(ids)),
            (CacheCounter.UNIQUE, len(multiplicity)),
            (CacheCounter.UNIQUE_MISSES, len(missing)),
            (CacheCounter.CONFLICT_UNIQUE_MISSES, conflicts),
            (CacheCounter.EVICTIONS, evictions),
        ):
            self.statistics[counter] += number_of
        return len(self.rows) - first_spill

    def commit(self, dirty: bool) -> RowMoves:
        """Put the result into the directory."""
        if dirty:
            for slot in self.used:
                self.dirty[slot] = 1
        d = self.directory
        for tensor, values in (
            (d.slot_rows, self.rows),
            (d.slot_batches, self.batches),
            (d.slot_dirty, self.dirty),
            (d.slot_counts, self.counts),
            (d.statistics, self.statistics),
        ):
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
        d.row_counts.copy_(self.row_counts)
        pairs = [torch.tensor(moves, dtype=torch.int32).view(-1, 2) for moves in (self.written, self.fetched)]
        written, fetched = (pair.to(d.slot_rows.device) for pair in pairs)
        return RowMoves(written[:, 0], written[:, 1], fetched[:, 0], fetched[:, 1])

    def _victim(self, row: int, count: int) -> int:
        """The slot of a row's set to put it into, or -1 for the spill area."""
        first = WAYS * (row % self.sets)
        slots = range(first, first + WAYS)
        for slot in slots:
            if self.rows[slot] < 0:
                return slot
        unlocked = [slot for slot in slots if self.batches[slot] < self.oldest_in_flight]
        if not unlocked:
            return -1
        if not self.directory.is_lfu:
            return min(unlocked, key=lambda slot: (self.batches[slot], slot))
        coldest = min(unlocked, key=lambda slot: (self.counts[slot], self.batches[slot], slot))
        return coldest if self.counts[coldest] <= count else -1

    def _empty(self, slot: int) -> None:
        if self.dirty[slot]:
            self.written.append((slot, self.rows[slot]))
        if self.directory.is_lfu:
            self.row_counts[self.rows[slot]] = self.counts[slot]
            self.counts[slot] = 0
        self.rows[slot], self.dirty[slot] = -1, 0

    def _extend(self) -> int:
        self.rows.append(-1)
        self.batches.append(0)
        self.dirty.append(0)
        if self.directory.is_lfu:
            self.counts.append(0)
        return len(self.rows) - 1

    def _count(self, byte: int, row: int, more: int) -> int:
        count = int(decode_counts(torch.tensor(byte))) + more
        number = row + self.first_row
        words = (number & 0xFFFFFFFF, self.batch & 0xFFFFFFFF, 0, STREAM_COUNTS + 256 * (number >> 32))
        c0, c1, c2, c3 = (torch.tensor(word) for word in words)
        return encode_count(count, int(philox((c0, c1, c2, c3), self.seed)[0]))
