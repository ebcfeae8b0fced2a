"""The rows of some tables: in backing stores, and in the slots of a TBE while they are in use."""

from collections.abc import Sequence

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, CacheAlgorithm
from torch import Tensor

from torchrec_mpe.cache.batch_ids import within_tables
from torchrec_mpe.cache.config import SPILL_GROWTH
from torchrec_mpe.cache.read_only_lookup import current_rows
from torchrec_mpe.cache.slot_tbe import SlotTBE
from torchrec_mpe.cache.table_spec import CachedTableSpec
from torchrec_mpe.ops.cache_slots import assign_cache_slots_
from torchrec_mpe.ops.cache_tensors import (
    WAYS,
    BackingStore,
    CacheCounter,
    CacheDirectory,
    RowMoves,
    empty_directory,
    empty_store,
)
from torchrec_mpe.ops.reference.lookup_counts import halve_counts_
from torchrec_mpe.ops.stored_rows import read_stored_rows_, write_stored_rows_
from torchrec_mpe.upstream.fused_optimizers import traits_of


class CachedRows:
    """Every table's rows, moved between its store and the slots of a TBE.

    What always holds between calls:

    - A row is in at most one slot, of its set or of the spill area. If it is in one, the slot has its value and its
      optimizer state; else the store has.
    - A slot that is not dirty holds what the store holds, so it may be forgotten. Only a dirty row is written back.
    - A row that a batch in flight looked up keeps its slot.

    Args:
        tables (Sequence[CachedTableSpec]): the tables.
        num_sets (Sequence[int]): of each table's cache.
        slots (SlotTBE): which has the slots.
        device (torch.device): of slots and directories.
        bounds_check_mode (BoundsCheckMode): for ids outside their table.

    Attributes:
        directories (List[CacheDirectory]): of each table's cache.
        stores (List[BackingStore]): of each table.
        stored_states (List[List[Tuple[int, str]]]): elements a row, and how they are stored, of each table's states.
        progress (List[Tensor]): int64 [7] of each table, the number of the last batch as of a checkpoint, then the
            directory's statistics.
        wanted_spill (List[int]): slots that the spill areas should have, and get when no batch is in flight.

    Raises:
        ValueError: if tables differ in how optimizer states are stored or values rounded, or a state may be negative
            and is to be stored as "ue6m2".
    """

    def __init__(
        self,
        tables: Sequence[CachedTableSpec],
        num_sets: Sequence[int],
        slots: SlotTBE,
        device: torch.device,
        bounds_check_mode: BoundsCheckMode,
    ) -> None:
        self._tables, self._num_sets, self._slots = list(tables), list(num_sets), slots
        self._bounds_check_mode = bounds_check_mode
        self._seeds = [table.config.table_seed(table.name) for table in tables]
        self._state_dtypes = _stored_state_dtypes(tables, slots)
        self._stochastic_rounding = tables[0].config.stochastic_rounding
        self._looked_up = [0] * len(tables)
        self._moving = False  # rows are not where the directories say
        self.wanted_spill = list(slots.spill)
        self.progress = [torch.zeros(7, dtype=torch.int64, device=device) for _ in tables]
        self.directories: list[CacheDirectory] = []
        self.stores: list[BackingStore] = []
        self.stored_states: list[list[tuple[int, str]]] = []
        for t, table in enumerate(tables):
            lfu = table.config.algorithm == CacheAlgorithm.LFU
            directory = empty_directory(table.rows, num_sets[t], slots.spill[t], lfu=lfu, device=device)
            self.directories.append(directory._replace(statistics=self.progress[t][1:]))
            states = zip(slots.states[t], self._state_dtypes, strict=True)
            layout = [(state.shape[1], dtype) for state, dtype in states]
            self.stored_states.append(layout)
            bits = table.config.bits if table.wide_rows is None else table.wide_rows
            on_host = table.config.location == "host"
            pinned = on_host and device.type == "cuda"
            place = torch.device("cpu") if on_host else device
            self.stores.append(empty_store(bits, table.rows, table.dim, layout, device=place, pin_memory=pinned))

    @torch.no_grad()
    def take_slots(
        self, indices: Tensor, per_table: Sequence[int], batch: int, oldest_in_flight: int, *, dirty: bool
    ) -> Tensor | None:
        """The slots of a batch's ids [N], with their rows in them.

        Args:
            indices (Tensor): [N].
            per_table (Sequence[int]): how many ids are of each table.
            batch (int): number of the batch, larger than all before.
            oldest_in_flight (int): the first batch whose rows may yet be updated; ``batch`` if there is none.
            dirty (bool): the batch is going to update its rows.

        Returns:
            Optional[Tensor]: None, and nothing has changed, if a spill area would have to grow while a batch is in
            flight.

        Raises:
            IndexError: for an id outside its table, in the modes FATAL and NONE; nothing has changed.
        """
        self.check_whole()
        idle = oldest_in_flight == batch
        if idle:
            self._grow(self.wanted_spill)
        if indices.is_cuda:
            indices = within_tables(indices, per_table, self._tables, self._bounds_check_mode)
        try:
            found, moves, needed = self._assign(indices, per_table, batch, oldest_in_flight, dirty)
        except IndexError:  # on a CPU the op looks for wrong ids, and another look is taken only if there is one
            indices = within_tables(indices, per_table, self._tables, self._bounds_check_mode)
            found, moves, needed = self._assign(indices, per_table, batch, oldest_in_flight, dirty)
        if any(n > spill for n, spill in zip(needed, self._slots.spill, strict=True)):
            self.wanted_spill = [max(n, spill) for n, spill in zip(needed, self.wanted_spill, strict=True)]
            if not idle:
                return None
            self._grow([int(n * SPILL_GROWTH) if n > s else s for n, s in zip(needed, self._slots.spill, strict=True)])
            found, moves, _ = self._assign(indices, per_table, batch, oldest_in_flight, dirty)
        written = [(move.written_slots, move.written_rows) for move in moves]
        fetched = [(move.fetched_slots, move.fetched_rows) for move in moves]
        self._write_back(range(len(self._tables)), self._slots.values, self._slots.states, written, batch)
        read_stored_rows_(self.stores, self._slots.values, self._slots.states, fetched, self._state_dtypes)
        self._moving = False
        self._halve_counts(per_table)
        return found

    def mark_dirty(self, slots: Tensor, per_table: Sequence[int]) -> None:
        """A batch that was not going to update its rows, now is."""
        for directory, of_table in zip(self.directories, slots.long().split(list(per_table)), strict=True):
            directory.slot_dirty.index_fill_(0, of_table, 1)

    @torch.no_grad()
    def write_dirty(self, batch: int) -> bool:
        """Write dirty rows to the store, with the random numbers of ``batch``; whether there were any."""
        self.check_whole()
        dirty = [directory.slot_dirty.nonzero().squeeze(1).int() for directory in self.directories]
        if not any(len(slots) for slots in dirty):
            return False
        moves = [(slots, d.slot_rows[slots]) for d, slots in zip(self.directories, dirty, strict=True)]
        self._write_back(range(len(self._tables)), self._slots.values, self._slots.states, moves, batch)
        return True

    def forget_before(self, oldest_in_flight: int) -> None:
        """Empty the slots of rows that no batch in flight looked up, after they were written."""
        for directory in self.directories:
            if directory.is_lfu:  # also of rows that stay, for a checkpoint
                held = directory.slot_rows >= 0
                directory.row_counts[directory.slot_rows[held].long()] = directory.slot_counts[held]
            _empty(directory, (directory.slot_rows >= 0) & (directory.slot_batches < oldest_in_flight))

    def forget_all(self) -> None:
        """Empty all slots, without writing to the store: neither rows nor how often they were looked up."""
        for directory in self.directories:
            directory.slot_rows.fill_(-1)
            directory.slot_dirty.zero_()
            directory.slot_counts.zero_()
        self._looked_up = [int(progress[1 + CacheCounter.REQUESTED]) for progress in self.progress]
        self._moving = False

    @torch.no_grad()
    def current(self, table: int, rows: Tensor) -> Tensor:
        """The values of some distinct rows, int64 [n], float32 [n, dim]."""
        self.check_whole()
        return current_rows(
            self.stores[table], self.directories[table], self._num_sets[table], self._slots.values[table], rows
        )

    @torch.no_grad()
    def set_rows(self, table: int, first: int, values: Tensor, batch: int) -> None:
        """Set neighbouring rows, float32 [n, dim], and clear their optimizer state; their slots become empty."""
        directory = self.directories[table]
        _empty(directory, (directory.slot_rows >= first) & (directory.slot_rows < first + len(values)))
        numbers = torch.arange(len(values), dtype=torch.int32, device=values.device)
        states = [torch.zeros(len(values), s.shape[1], device=s.device) for s in self._slots.states[table]]
        self._write_back([table], [values], [states], [(numbers, numbers + first)], batch)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of all tensors here and in the TBE's tables."""
        size = {"store": 0, "cache": 0, "spill": 0, "optimizer_state": 0, "directory": 0}
        for t, directory in enumerate(self.directories):
            cache = WAYS * self._num_sets[t]
            size["store"] += sum(tensor.nbytes for tensor in self.stores[t])
            size["cache"] += self._slots.values[t][:cache].nbytes
            size["spill"] += self._slots.values[t][cache:].nbytes
            size["optimizer_state"] += sum(state.nbytes for state in self._slots.states[t])
            size["directory"] += sum(tensor.nbytes for tensor in directory) + self.progress[t][:1].nbytes
        return size

    def check_whole(self) -> None:
        """Raise RuntimeError if rows were lost."""
        if self._moving:
            raise RuntimeError(
                f"tables {_names(self._tables)}: an error or interrupt came while rows moved between cache and store, "
                "and some are lost; load a checkpoint"
            )

    def _assign(
        self, indices: Tensor, per_table: Sequence[int], batch: int, oldest_in_flight: int, dirty: bool
    ) -> tuple[Tensor, list[RowMoves], list[int]]:
        # From here on directories may be ahead of the rows: an interrupt comes when the op returns.
        self._moving = True
        try:
            found, moves, needed = assign_cache_slots_(
                self.directories,
                indices,
                per_table,
                [table.rows for table in self._tables],
                self._num_sets,
                [table.first_row for table in self._tables],
                self._seeds,
                batch,
                oldest_in_flight,
                dirty,
            )
        except Exception:  # before anything has changed
            self._moving = False
            raise
        if not moves:
            self._moving = False
        return found, moves, needed

    def _write_back(
        self,
        tables: Sequence[int],
        values: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        moves: Sequence[tuple[Tensor, Tensor]],
        batch: int,
    ) -> None:
        write_stored_rows_(
            [self.stores[t] for t in tables],
            values,
            states,
            moves,
            self._state_dtypes,
            batch,
            [self._seeds[t] for t in tables],
            [self._tables[t].first_row for t in tables],
            [self._tables[t].first_column for t in tables],
            self._stochastic_rounding,
        )

    def _halve_counts(self, per_table: Sequence[int]) -> None:
        for t, (table, directory) in enumerate(zip(self._tables, self.directories, strict=True)):
            before, self._looked_up[t] = self._looked_up[t], self._looked_up[t] + per_table[t]
            period = table.config.half_life * table.rows
            if directory.is_lfu and self._looked_up[t] // period > before // period:
                halve_counts_(directory.slot_counts)
                halve_counts_(directory.row_counts)

    def _grow(self, spill: Sequence[int]) -> None:
        """Make the spill areas at least this large. No batch may be in flight."""
        before = self._slots.spill
        spill = [max(new, old) for new, old in zip(spill, before, strict=True)]
        if spill == before:
            return
        grown: list[CacheDirectory] = []
        for directory, new, old in zip(self.directories, spill, before, strict=True):
            added, counted = new - old, new - old if directory.is_lfu else 0
            grown.append(
                directory._replace(
                    slot_rows=torch.cat([directory.slot_rows, directory.slot_rows.new_full((added,), -1)]),
                    slot_batches=torch.cat([directory.slot_batches, directory.slot_batches.new_zeros(added)]),
                    slot_dirty=torch.cat([directory.slot_dirty, directory.slot_dirty.new_zeros(added)]),
                    slot_counts=torch.cat([directory.slot_counts, directory.slot_counts.new_zeros(counted)]),
                )
            )
        self._moving = True
        try:
            self._slots.grow(spill)
        except Exception:  # before anything has changed
            self._moving = False
            raise
        self.directories, self.wanted_spill = grown, spill
        self._moving = False


def _empty(directory: CacheDirectory, leaving: Tensor) -> None:
    """Forget the rows of some slots, bool [slots], but not how often they were looked up."""
    if directory.is_lfu:
        directory.row_counts[directory.slot_rows[leaving].long()] = directory.slot_counts[leaving]
        directory.slot_counts[leaving] = 0
    directory.slot_rows[leaving] = -1
    directory.slot_dirty[leaving] = 0


def _stored_state_dtypes(tables: Sequence[CachedTableSpec], slots: SlotTBE) -> list[str]:
    """How each optimizer state is stored."""
    first = tables[0].config
    for table in tables:
        for field in ("optimizer_state_dtype", "stochastic_rounding"):
            if getattr(table.config, field) != getattr(first, field):
                raise ValueError(f"tables {tables[0].name} and {table.name} share a TBE but not {field} of CacheConfig")
    optimizer: EmbOptimType = slots.optimizer
    dtypes = [first.state_dtype(optimizer, state.shape[1]) for state in slots.states[0]]
    if "ue6m2" in dtypes and not traits_of(optimizer).never_negative:
        raise ValueError(
            f"tables {_names(tables)}: the state of {optimizer.value} may be negative, which ue6m2 cannot store; use "
            "bf16 or fp32"
        )
    return dtypes


def _names(tables: Sequence[CachedTableSpec]) -> str:
    return ", ".join(table.name for table in tables)
